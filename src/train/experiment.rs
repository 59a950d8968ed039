//! An experiment: trains and evaluates its arms in sequence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use candle_core::Device;

use super::arm::Arm;
use super::checkpoint::{Checkpoint, save_checkpoint};
use super::config::{CONFIG_FILE, Config, Start};
use super::evaluation::{TestSets, scores_folder};
use super::folder::RunFolder;
use super::given_weights::{GivenWeights, Origin};
use super::inputs::{ChangedData, Inputs, other_data};
use super::mask_head::head_of_arm;
use super::outcome::{ArmOutcome, Event, Finished, Outcome, RESULTS_FILE};
use super::soup::average;
use super::start::{ArmStart, Centres};
use super::state::{Position, TrainState, remove_states, states_folder};
use super::steps::Steps;
use super::training::{Context, Trained, Training, lg_folder};
use crate::data::{AugmentConfig, Dataset, Loader, Splits, TestSet, Transform};
use crate::dist::Ranks;
use crate::error::{Error, Result};
use crate::files::{remove_unfinished, write_atomic};
use crate::machine::Machine;
use crate::models::{BACKBONE_FILE, Model, ModelConfig};
use crate::records::Records;

/// A set of arms to train and evaluate on one data set.
///
/// ```no_run
/// use std::path::Path;
///
/// use maskinv::train::{Arm, Event, Experiment, RunFolder, preset};
///
/// # fn main() -> maskinv::Result<()> {
/// let mut config = preset("procedural")?;
/// config.train.arms = vec![Arm::Teacher, Arm::Aug, Arm::Hg];
/// let experiment = Experiment::new(config)?.in_folder(RunFolder::empty(Path::new("runs/mine"))?);
/// let outcome = experiment.run(&mut |event| {
///     if let Event::Step(record) = event {
///         println!("step {}: loss {:.3}", record.step, record.report.loss);
///     }
/// })?;
/// println!("{}", maskinv::eval::table(&outcome.rows()));
/// # Ok(())
/// # }
/// ```
#[must_use = "an experiment does nothing until it runs"]
pub struct Experiment {
    config: Config,
    splits: Splits,
    /// The teacher's training set, if its arm is trained and the set is not the students'.
    teacher_train: Option<Arc<dyn Dataset>>,
    folder: Option<RunFolder>,
    given: GivenWeights,
    machine: Machine,
    /// Arms that an earlier run finished.
    finished: BTreeMap<Arm, ArmOutcome>,
    /// Arms that an earlier run finished and whose weights are no longer there.
    gone: Vec<Arm>,
    resumes: bool,
    changed_data: ChangedData,
    stop: Option<Arc<AtomicBool>>,
}

impl Experiment {
    /// Opens the data and returns an experiment, with the arms that a soup averages. It can be rehearsed; to run, it
    /// needs [`Self::in_folder`].
    ///
    /// # Errors
    /// When a setting is out of range, or data is missing or corrupt.
    pub fn new(mut config: Config) -> Result<Self> {
        config.validate()?;
        config.train.complete_arms();
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
            given: GivenWeights::default(),
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

    /// Weights that it was given.
    pub(super) fn given(&self) -> &GivenWeights {
        &self.given
    }

    /// Machine that it runs on.
    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Ranks that it runs on.
    fn ranks(&self) -> &Ranks {
        self.machine.ranks()
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
        resumed.ranks().first_does(|| {
            let arms = Arm::ALL.map(|arm| resumed.arm_folder(arm));
            arms.iter().map(PathBuf::as_path).chain([resumed.out()]).try_for_each(remove_unfinished)
        })?;
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
    pub fn stopped_by(self, flag: Arc<AtomicBool>) -> Self {
        Self { stop: Some(flag), ..self }
    }

    /// Trains and evaluates on `machine` instead of the CPU.
    pub fn on(self, machine: &Machine) -> Self {
        Self { machine: machine.clone(), given: self.given.on(machine), ..self }
    }

    /// Says why the training cannot run on its machine, if it cannot: the engine there does not support a network.
    ///
    /// # Errors
    /// When the settings describe no network.
    pub fn refusal(&self) -> Result<Option<String>> {
        if self.machine.is_cpu() {
            return Ok(None);
        }
        let student = Model::new(&self.config.model, &Device::Cpu, 0)?;
        let teacher = self.given.teacher.as_ref().map(|teacher| &teacher.backbone);
        Ok([Some(&student), teacher].into_iter().flatten().find_map(|model| model.refusal(&self.machine)))
    }

    /// Uses `teacher` instead of training one.
    pub fn with_teacher(self, teacher: Checkpoint) -> Self {
        let teacher = Some(teacher.on(&self.machine));
        Self { given: GivenWeights { teacher, ..self.given }, ..self }
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
        let start = Some(start.on(&self.machine));
        Ok(Self { given: GivenWeights { start, ..self.given }, ..self })
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
            if !has_begun && matches!(event, Event::Step(_)) {
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

    /// Checks that all ranks do the same work.
    fn agree(&self, inputs: &Inputs) -> Result<()> {
        self.machine.agree(&self.config.to_toml()?)?;
        self.ranks().agree("data and given weights", &inputs.digest()?)
    }

    /// Returns what the arms learn from.
    fn inputs(&self) -> Result<Inputs> {
        Inputs::of(&self.splits, self.teacher_train.as_deref(), &self.given)
    }

    /// Checks that all ranks do the same work, if there are others.
    pub(super) fn check_ranks(&self) -> Result<()> {
        if self.ranks().is_single() { Ok(()) } else { self.agree(&self.inputs()?) }
    }

    fn run_arms(&self, on: &mut dyn FnMut(Event)) -> Result<Outcome> {
        self.given.check(&self.config, &self.config.train.arms, self.splits.train.num_classes())?;
        let Some(folder) = &self.folder else {
            return Err(Error::Training("expected a folder for the results, found none".to_owned()));
        };
        if !folder.is_locked() {
            let what = "its file system has no locks: make sure that no other process writes to it";
            on(Event::Notice(format!("{}: {what}", folder.path().display())));
        }
        let inputs = self.inputs()?;
        self.agree(&inputs)?;
        let (ranks, settings) = (self.ranks(), self.config.to_toml()?);
        ranks.first_does(|| inputs.check(self.out(), self.resumes, self.changed_data, on))?;
        let inputs = inputs.digest()?;
        ranks.first_does(|| write_atomic(&self.out().join(CONFIG_FILE), settings.as_bytes()))?;
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
            teacher: self.given.teacher.as_ref().map(|t| t.name.clone()),
            start: self.given.start.as_ref().map(|t| t.name.clone()),
            arms: BTreeMap::new(),
            paired_tests: Vec::new(),
        };
        let mut earlier = EarlierArms::default();
        let arms = &self.config.train.arms;
        // Too few images or a missing template should end the first arm, not the last.
        for arm in arms.iter().filter(|arm| !self.finished.contains_key(arm)) {
            self.loader(*arm)?;
        }
        if let Some(teacher) = self.given.teacher.as_ref().filter(|_| !arms.contains(&Arm::Teacher)) {
            // The table of results compares the students with it.
            let (evaluation, real_masks) = self.test_sets().evaluate(&teacher.backbone, None, on)?;
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
                self.recall(arm, &mut earlier)?;
                outcome.arms.insert(arm, result.clone());
                continue;
            }
            if self.gone.contains(&arm) {
                let path = self.arm_folder(arm).join(BACKBONE_FILE);
                on(Event::Notice(format!("{}: trained again, {} is gone", arm.title(), path.display())));
            }
            let result = match arm {
                Arm::Soup => self.run_soup(on)?,
                _ => self.run_arm(arm, &inputs, &mut earlier, on)?,
            };
            on(Event::Finished { arm, evaluation: &result.evaluation });
            outcome.arms.insert(arm, result);
            // Written after every arm, so that a later failure does not lose finished arms.
            ranks.first_does(|| {
                self.write_results(&outcome)?;
                remove_states(&self.arm_folder(arm))
            })?;
        }
        // The other ranks have nothing more to do.
        if ranks.is_first() {
            outcome.paired_tests = self.test_sets().paired(arms, self.out(), on)?;
            self.write_results(&outcome)?;
        }
        // What the machine found amiss, such as a convolution that runs a slower way.
        self.machine.take_notices().into_iter().for_each(|said| on(Event::Notice(said)));
        Ok(outcome)
    }

    fn write_results(&self, outcome: &Outcome) -> Result<()> {
        let json = serde_json::to_vec_pretty(outcome).map_err(|e| Error::Config(e.to_string()))?;
        write_atomic(&self.out().join(RESULTS_FILE), &json)
    }

    /// Loads what later arms may need from an arm that an earlier run finished.
    fn recall(&self, arm: Arm, earlier: &mut EarlierArms) -> Result<()> {
        let (folder, machine) = (self.arm_folder(arm), &self.machine);
        match arm {
            Arm::Teacher => earlier.teacher = Some(Checkpoint::saved(&folder, machine)?),
            Arm::Lg if self.config.train.arms.contains(&Arm::Hg) && self.config.train.hg_start == Start::Lg => {
                earlier.lg = Some(Checkpoint::saved(&lg_folder(&folder, &self.config), machine)?);
            }
            Arm::Lg | Arm::Aug | Arm::Hg | Arm::Distill | Arm::Ada | Arm::Soup => {}
        }
        Ok(())
    }

    /// Returns the training set of an arm.
    pub(super) fn train_set(&self, arm: Arm) -> &Arc<dyn Dataset> {
        self.teacher_train.as_ref().filter(|_| arm == Arm::Teacher).unwrap_or(&self.splits.train)
    }

    fn run_arm(
        &self,
        arm: Arm,
        inputs: &str,
        earlier: &mut EarlierArms,
        on: &mut dyn FnMut(Event),
    ) -> Result<ArmOutcome> {
        let teacher = self.given.teacher.as_ref().or(earlier.teacher.as_ref());
        let start = self.given.origin(&self.config, arm).and_then(|origin| {
            let weights = match origin {
                Origin::Given => self.given.start.as_ref(),
                Origin::Teacher => teacher,
                Origin::Lg => earlier.lg.as_ref(),
            };
            Some((origin, weights?))
        });
        let state = self.state(arm, inputs, on)?;
        let steps = self.steps(&self.arm_start(arm, teacher, start), state, &mut earlier.centres, on)?;
        let context = Context {
            config: &self.config,
            machine: &self.machine,
            train: self.train_set(arm).as_ref(),
            watch: self.splits.watch.as_ref().unwrap_or(&self.splits.test),
            folder: self.arm_folder(arm),
            inputs,
            start: start.map(|(_, weights)| weights),
            stop: self.stop.as_ref(),
        };
        let Trained { position, checkpoint, lg } = Training::new(context, steps)?.run(on)?;
        let Position { step: num_steps, seconds, num_skipped, last_loss, best, .. } = position;
        let scores = scores_folder(&self.arm_folder(arm));
        let (evaluation, real_masks) = self.test_sets().evaluate(&checkpoint.backbone, Some(&scores), on)?;
        match arm {
            Arm::Teacher => earlier.teacher = Some(checkpoint),
            Arm::Lg => earlier.lg = lg,
            Arm::Aug | Arm::Hg | Arm::Distill | Arm::Ada | Arm::Soup => {}
        }
        Ok(ArmOutcome { num_steps, num_skipped, seconds, last_loss, best, evaluation, real_masks })
    }

    /// Averages the arms of `train.soup`, which were trained before.
    fn run_soup(&self, on: &mut dyn FnMut(Event)) -> Result<ArmOutcome> {
        let (config, folder, began) = (&self.config, self.arm_folder(Arm::Soup), Instant::now());
        let saved = |arm: &Arm| Checkpoint::saved(&self.arm_folder(*arm), &self.machine);
        let arms = config.train.soup.iter().map(saved).collect::<Result<Vec<_>>>()?;
        let share = 1.0 / arms.len() as f64;
        let models: Vec<(f64, &Model)> = arms.iter().map(|arm| (share, &arm.backbone)).collect();
        let Some((first, others)) = models.split_first() else {
            return Err(Error::Config("train.soup: expected two arms or more, found none".into()));
        };
        let mut backbone = average(*first, others)?;
        let train = self.train_set(Arm::Soup).as_ref();
        let head = head_of_arm(Arm::Soup, &backbone, train, config, on);
        backbone = backbone.with_mask_head(head);
        self.ranks().first_does(|| save_checkpoint(&folder, &backbone, None))?;
        let seconds = began.elapsed().as_secs_f64();
        let (evaluation, real_masks) = self.test_sets().evaluate(&backbone, Some(&scores_folder(&folder)), on)?;
        Ok(ArmOutcome { num_steps: 0, num_skipped: 0, seconds, last_loss: None, best: None, evaluation, real_masks })
    }

    /// Returns what an arm starts from.
    pub(super) fn arm_start<'a>(
        &'a self,
        arm: Arm,
        teacher: Option<&'a Checkpoint>,
        start: Option<(Origin, &'a Checkpoint)>,
    ) -> ArmStart<'a> {
        ArmStart {
            arm,
            config: &self.config,
            machine: &self.machine,
            train: self.train_set(arm).as_ref(),
            teacher: teacher.map(|teacher| &teacher.backbone),
            start,
            changed_data: self.changed_data,
        }
    }

    /// Returns the steps of an arm from `state`, or from its first one.
    pub(super) fn steps(
        &self,
        start: &ArmStart,
        state: Option<TrainState>,
        centres: &mut Centres,
        on: &mut dyn FnMut(Event),
    ) -> Result<Steps> {
        let arm = start.arm;
        let loader = self.loader(arm)?;
        let trainer = start.trainer(state.as_ref(), centres, on)?;
        let first = || Position::start(arm, self.config.epochs(arm).start);
        let at = state.map_or_else(first, |state| state.position);
        Ok(Steps::new(self.config.clone(), loader, trainer, at))
    }

    /// Returns the loader of an arm's batches.
    ///
    /// # Errors
    /// When there are fewer images than a batch, or a mask template is missing or corrupt.
    pub fn loader(&self, arm: Arm) -> Result<Loader> {
        let config = &self.config;
        let augment = match arm {
            Arm::Teacher => AugmentConfig { flip: config.augment.flip, mask: 0.0, ..AugmentConfig::default() },
            _ => config.augment.clone(),
        };
        let transform = Transform::new(&augment, &config.mask)?;
        let train = self.train_set(arm).clone();
        let loader = Loader::new(train, transform, &config.loader, config.model.input_size, config.train.seed)?;
        let (rank, num_ranks) = (self.ranks().rank(), self.ranks().size());
        loader.on_broken(config.data.on_broken).shard(rank, num_ranks, config.train.accumulate)
    }

    /// Returns the newest intact training checkpoint of an arm, if training resumes and there is one.
    fn state(&self, arm: Arm, inputs: &str, on: &mut dyn FnMut(Event)) -> Result<Option<TrainState>> {
        let folder = states_folder(&self.arm_folder(arm));
        if !self.resumes {
            // Left by an earlier training in the same folder.
            self.ranks().first_does(|| remove_states(&self.arm_folder(arm)))?;
            return Ok(None);
        }
        let (state, problems) = TrainState::newest(&folder, self.ranks())?;
        if state.is_none() && Records::is_in(&self.arm_folder(arm)) {
            let what = "no training checkpoint is left, so it begins anew";
            on(Event::Notice(format!("{}: {what} ({})", arm.title(), folder.display())));
        }
        problems.into_iter().for_each(|problem| on(Event::Notice(problem)));
        let Some(TrainState { position, settings, inputs: of_state, .. }) = &state else { return Ok(None) };
        // Compared as settings, not as text, because a later version may know more settings.
        let of_checkpoint = Config::parse(settings)
            .map_err(|what| Error::Data { path: folder.clone(), what: format!("settings of a checkpoint: {what}") })?;
        let differences = of_checkpoint.differences(&self.config)?;
        if !differences.is_empty() {
            let found = differences.join(", ");
            let what = format!("expected checkpoints of a training with the same settings, found {found}");
            return Err(Error::Data { path: folder, what });
        }
        let is_of_other = of_state.as_deref().is_some_and(|digest| digest != inputs);
        if is_of_other && self.changed_data == ChangedData::Refuse {
            return Err(other_data(self.out(), "its training checkpoint was saved with other data"));
        }
        on(Event::Notice(format!("{}: resumes after step {}", arm.title(), position.step)));
        Ok(state)
    }

    fn test_sets(&self) -> TestSets<'_> {
        let Splits { test, real_masks, .. } = &self.splits;
        TestSets { config: &self.config.eval, test, real_masks: real_masks.as_ref() }
    }
}

/// Results of earlier arms that later arms of an experiment may need.
#[derive(Default)]
struct EarlierArms {
    teacher: Option<Checkpoint>,
    lg: Option<Checkpoint>,
    centres: Centres,
}
