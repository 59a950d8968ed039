//! An experiment: trains and evaluates its arms in sequence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor};

use super::arm::Arm;
use super::checkpoint::Checkpoint;
use super::config::{Config, Start};
use super::epochs::remove_states;
use super::folder::RunFolder;
use super::inputs::ChangedData;
use super::outcome::{ArmOutcome, Event, Finished, Outcome, RESULTS_FILE};
use super::start::Origin;
use super::state::Position;
use crate::data::{Dataset, Splits, TestSet};
use crate::error::{Error, Result};
use crate::files::{remove_unfinished, write_atomic};
use crate::machine::Machine;
use crate::models::{BACKBONE_FILE, Model, ModelConfig, load_model};

/// File name of the resolved settings in the results folder.
pub const CONFIG_FILE: &str = "config.toml";
/// File name of the fingerprint of the data in the results folder.
pub(super) const DATA_FILE: &str = "data.json";

/// A set of arms to train and evaluate on one data set.
pub struct Experiment {
    pub(super) config: Config,
    pub(super) splits: Splits,
    /// The teacher's training set, if its arm is trained and the set is not the students'.
    pub(super) teacher_train: Option<Arc<dyn Dataset>>,
    folder: Option<RunFolder>,
    /// A given teacher, used instead of training one.
    pub(super) teacher: Option<Checkpoint>,
    /// Given weights that every trained arm starts from.
    pub(super) start: Option<Checkpoint>,
    pub(super) machine: Machine,
    /// Arms that an earlier run finished.
    finished: BTreeMap<Arm, ArmOutcome>,
    /// Arms that an earlier run finished and whose weights are no longer there.
    gone: Vec<Arm>,
    pub(super) resumes: bool,
    pub(super) changed_data: ChangedData,
    pub(super) stop: Option<&'static AtomicBool>,
}

impl Experiment {
    /// Opens the data and returns an experiment. It can be rehearsed; to run, it needs [`Self::in_folder`].
    ///
    /// # Errors
    /// When a setting is out of range, or data is missing or corrupt.
    pub fn new(config: Config) -> Result<Self> {
        config.validate()?;
        let splits = config.data.open()?;
        splits.test.check_images()?;
        splits.watch.iter().try_for_each(TestSet::check_images)?;
        splits.real_masks.iter().try_for_each(TestSet::check_images)?;
        let teacher_train = match config.train.arms.contains(&Arm::Teacher) {
            true => config.data.open_teacher_train()?,
            false => None,
        };
        Ok(Self {
            config,
            splits,
            teacher_train,
            folder: None,
            teacher: None,
            start: None,
            machine: Machine::default(),
            finished: BTreeMap::new(),
            gone: Vec::new(),
            resumes: false,
            changed_data: ChangedData::Refuse,
            stop: None,
        })
    }

    /// Returns the settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the training and test data.
    pub fn splits(&self) -> &Splits {
        &self.splits
    }

    /// Writes the results to `folder`.
    pub fn in_folder(self, folder: RunFolder) -> Self {
        Self { folder: Some(folder), ..self }
    }

    /// Sets whether data and class centres of other people than expected are accepted.
    pub fn with_changed_data(self, changed_data: ChangedData) -> Self {
        Self { changed_data, ..self }
    }

    /// Resumes the training in `folder`: keeps finished arms and continues the interrupted one from its newest intact
    /// training checkpoint, as if it had never stopped. An arm whose weights are gone is trained again.
    ///
    /// # Errors
    /// When `results.json` cannot be read or was written with different settings.
    pub fn resumed(self, folder: RunFolder) -> Result<Self> {
        let resumed = Self { resumes: true, ..self.in_folder(folder) };
        for folder in Arm::ALL.map(|arm| resumed.arm_folder(arm)).iter().map(PathBuf::as_path).chain([resumed.out()]) {
            remove_unfinished(folder)?;
        }
        let path = resumed.out().join(RESULTS_FILE);
        if !path.exists() {
            return Ok(resumed);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let wrong = |what: String| Error::Format { path: path.clone(), offset: 0, what };
        let before: Finished =
            serde_json::from_str(&text).map_err(|e| wrong(format!("not the results of a training: {e}")))?;
        let differences = before.config.differences(&resumed.config)?;
        if !differences.is_empty() {
            let what = format!("expected results of the same settings, found {}", differences.join(", "));
            return Err(Error::Data { path, what });
        }
        let (finished, gone): (BTreeMap<Arm, ArmOutcome>, BTreeMap<Arm, ArmOutcome>) =
            before.arms.into_iter().partition(|(arm, _)| resumed.arm_folder(*arm).join(BACKBONE_FILE).is_file());
        let is_trained = |arm: &&Arm| resumed.config.train.arms.contains(arm);
        let gone = gone.keys().filter(is_trained).copied().collect();
        Ok(Self { finished, gone, ..resumed })
    }

    /// Returns the results folder; the empty path without one.
    pub(super) fn out(&self) -> &Path {
        self.folder.as_ref().map_or(Path::new(""), RunFolder::path)
    }

    /// Returns an arm's folder in the results folder.
    pub(super) fn arm_folder(&self, arm: Arm) -> PathBuf {
        self.out().join(arm.name())
    }

    /// Makes training stop after the step in which `flag` is set: it saves a training checkpoint to resume from and
    /// returns [`Error::Stopped`].
    pub fn stopped_by(self, flag: &'static AtomicBool) -> Self {
        Self { stop: Some(flag), ..self }
    }

    /// Trains and evaluates on `machine` instead of the CPU.
    pub fn on(self, machine: &Machine) -> Self {
        let moved = |checkpoint: Checkpoint| Checkpoint { backbone: checkpoint.backbone.on(machine), ..checkpoint };
        let (teacher, start) = (self.teacher.map(moved), self.start.map(moved));
        Self { machine: machine.clone(), teacher, start, ..self }
    }

    /// Says why the training cannot run on its machine, if it cannot: the engine there does not support a network.
    ///
    /// # Errors
    /// When the settings describe no network.
    pub fn refusal(&self) -> Result<Option<String>> {
        if self.machine.gpu_bytes().is_none() {
            return Ok(None);
        }
        let student = Model::new(&self.config.model, &Device::Cpu, 0)?;
        let teacher = self.teacher.as_ref().map(|teacher| &teacher.backbone);
        Ok([Some(&student), teacher].into_iter().flatten().find_map(|model| model.refusal(&self.machine)))
    }

    /// Uses `teacher` instead of training one.
    pub fn with_teacher(self, teacher: Checkpoint) -> Self {
        let teacher = Checkpoint { backbone: teacher.backbone.on(&self.machine), ..teacher };
        Self { teacher: Some(teacher), ..self }
    }

    /// Starts every trained arm from these weights.
    ///
    /// # Errors
    /// When the weights are for a different network than the settings describe.
    pub fn with_start(self, start: Checkpoint) -> Result<Self> {
        // Dropout has no weights.
        let wanted = ModelConfig { dropout: 0.0, ..self.config.model.clone() };
        let found = ModelConfig { dropout: 0.0, ..start.backbone.config().clone() };
        if wanted != found {
            let what = format!("does not fit the model: {}", wanted.difference(&found));
            return Err(Error::Checkpoint { path: start.name.into(), what });
        }
        let start = Checkpoint { backbone: start.backbone.on(&self.machine), ..start };
        Ok(Self { start: Some(start), ..self })
    }

    /// Trains and evaluates the arms that the settings list and saves each under its name in the results folder.
    /// Writes the resolved settings to `config.toml` there, and `results.json` after each arm.
    ///
    /// # Errors
    /// When there is no results folder, an arm depends on one that is neither given nor trained before it, the data is
    /// not that which a resumed training was begun with, or training, saving or evaluation fails. What is in the
    /// results folder is removed again if a new training fails before its first step: it would be in the way of the
    /// right settings.
    pub fn run(&self, on: &mut dyn FnMut(Event)) -> Result<Outcome> {
        let (mut has_begun, mut removed) = (self.resumes, Ok(()));
        let outcome = self.run_arms(&mut |event| {
            if !has_begun && matches!(event, Event::Step { .. }) {
                has_begun = true;
                removed = self.folder.as_ref().map_or(Ok(()), RunFolder::has_begun);
            }
            on(event);
        });
        removed?;
        match (&outcome, &self.folder) {
            (Err(error), Some(folder)) if !has_begun && !matches!(error, Error::Stopped { .. }) => folder.clear()?,
            (_, Some(folder)) => folder.has_begun()?,
            (_, None) => {}
        }
        outcome
    }

    fn run_arms(&self, on: &mut dyn FnMut(Event)) -> Result<Outcome> {
        self.check(&self.config.train.arms)?;
        let Some(folder) = &self.folder else {
            return Err(Error::Training("expected a folder for the results, found none".to_owned()));
        };
        if !folder.is_locked() {
            let what = "its file system has no locks: make sure that no other process writes to it";
            on(Event::Notice(format!("{}: {what}", folder.path().display())));
        }
        let inputs = self.check_inputs(on)?;
        write_atomic(&self.out().join(CONFIG_FILE), self.config.to_toml()?.as_bytes())?;
        if let Some(found) = &self.splits.found {
            on(Event::Notice(found.clone()));
        }
        let mut outcome = Outcome {
            version: env!("CARGO_PKG_VERSION"),
            commit: env!("MASKINV_COMMIT"),
            device: self.machine.to_string(),
            threads: rayon::current_num_threads(),
            test_set: self.splits.test.description.clone(),
            config: self.config.clone(),
            teacher: self.teacher.as_ref().map(|t| t.name.clone()),
            start: self.start.as_ref().map(|t| t.name.clone()),
            arms: BTreeMap::new(),
            paired_tests: Vec::new(),
        };
        let mut trained = Trained::default();
        let arms = &self.config.train.arms;
        if let Some(teacher) = self.teacher.as_ref().filter(|_| !arms.contains(&Arm::Teacher)) {
            // The table of results compares the students with it.
            let (evaluation, real_masks) = self.evaluate(&teacher.backbone, None, on)?;
            on(Event::Finished { arm: Arm::Teacher, evaluation: &evaluation });
            let result = ArmOutcome {
                num_steps: 0,
                num_skipped: 0,
                seconds: 0.0,
                last_loss: None,
                best: None,
                evaluation,
                real_masks,
            };
            outcome.arms.insert(Arm::Teacher, result);
        }
        for &arm in arms {
            if let Some(result) = self.finished.get(&arm) {
                on(Event::Notice(format!("{}: already trained", arm.title())));
                self.recall(arm, &mut trained)?;
                outcome.arms.insert(arm, result.clone());
                continue;
            }
            if self.gone.contains(&arm) {
                let path = self.arm_folder(arm).join(BACKBONE_FILE);
                on(Event::Notice(format!("{}: trained again, {} is gone", arm.title(), path.display())));
            }
            let result = self.run_arm(arm, &inputs, &mut trained, on)?;
            on(Event::Finished { arm, evaluation: &result.evaluation });
            outcome.arms.insert(arm, result);
            // Written after every arm, so that a later failure does not lose finished arms.
            self.write_results(&outcome)?;
            remove_states(&self.arm_folder(arm))?;
        }
        outcome.paired_tests = self.paired_tests(arms, on)?;
        self.write_results(&outcome)?;
        self.tell_of_machine(on);
        Ok(outcome)
    }

    /// Tells what the machine found amiss, such as a convolution that runs a slower way.
    pub(super) fn tell_of_machine(&self, on: &mut dyn FnMut(Event)) {
        self.machine.take_notices().into_iter().for_each(|said| on(Event::Notice(said)));
    }

    fn write_results(&self, outcome: &Outcome) -> Result<()> {
        let json = serde_json::to_vec_pretty(outcome).map_err(|e| Error::Config(e.to_string()))?;
        write_atomic(&self.out().join(RESULTS_FILE), &json)
    }

    /// Loads what later arms may need from an arm that an earlier run finished.
    fn recall(&self, arm: Arm, trained: &mut Trained) -> Result<()> {
        match arm {
            Arm::Teacher => trained.teacher = Some(self.saved(&self.arm_folder(arm))?),
            Arm::Lg if self.config.train.arms.contains(&Arm::Hg) && self.config.train.hg_start == Start::Lg => {
                trained.lg = Some(self.saved(&self.lg_folder())?);
            }
            Arm::Lg | Arm::Aug | Arm::Hg | Arm::Distill => {}
        }
        Ok(())
    }

    /// Loads model weights that this experiment saved.
    pub(super) fn saved(&self, folder: &Path) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::of(load_model(folder, None)?)?;
        Ok(Checkpoint { backbone: checkpoint.backbone.on(&self.machine), ..checkpoint })
    }

    /// Folder of the LG student's weights at the epoch from which HG continues it.
    pub(super) fn lg_folder(&self) -> PathBuf {
        self.arm_folder(Arm::Lg).join(format!("epoch-{}", self.config.train.hg_first_epoch))
    }

    /// Returns the training set of an arm.
    pub(super) fn train_set(&self, arm: Arm) -> &Arc<dyn Dataset> {
        self.teacher_train.as_ref().filter(|_| arm == Arm::Teacher).unwrap_or(&self.splits.train)
    }

    fn run_arm(&self, arm: Arm, inputs: &str, trained: &mut Trained, on: &mut dyn FnMut(Event)) -> Result<ArmOutcome> {
        let teacher = self.teacher.as_ref().or(trained.teacher.as_ref());
        let start = self.origin(arm).and_then(|origin| {
            let weights = match origin {
                Origin::Given => self.start.as_ref(),
                Origin::Teacher => teacher,
                Origin::Lg => trained.lg.as_ref(),
            };
            Some((origin, weights?))
        });
        let state = self.state(arm, inputs, on)?;
        let mut trainer =
            self.trainer(arm, teacher.map(|t| &t.backbone), start, state.as_ref(), &mut trained.centres, on)?;
        let start = start.map(|(_, weights)| weights);
        let (position, checkpoint, lg) =
            self.train(arm, inputs, &mut trainer, start, state.map(|state| state.position), on)?;
        drop(trainer);
        let Position { step: num_steps, seconds, num_skipped, last_loss, best, .. } = position;
        let (evaluation, real_masks) = self.evaluate(&checkpoint.backbone, Some(&self.scores_folder(arm)), on)?;
        match arm {
            Arm::Teacher => trained.teacher = Some(checkpoint),
            Arm::Lg => trained.lg = lg,
            Arm::Aug | Arm::Hg | Arm::Distill => {}
        }
        Ok(ArmOutcome { num_steps, num_skipped, seconds, last_loss, best, evaluation, real_masks })
    }
}

/// Results of earlier arms that later arms of an experiment may need.
#[derive(Default)]
struct Trained {
    teacher: Option<Checkpoint>,
    lg: Option<Checkpoint>,
    /// Mean embeddings as class centres, by the origin of the weights that computed them.
    centres: BTreeMap<Origin, Tensor>,
}
