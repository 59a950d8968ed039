//! The loop over arms and epochs, and the record of what came out.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde::Serialize;

use super::arm::Arm;
use super::centres::mean_embeddings;
use super::checkpoint::{Checkpoint, save_checkpoint};
use super::config::{BatchNormMode, Config, HeadStart, Start};
use super::step::{StepReport, Trainer};
use crate::data::{AugmentConfig, Loader, Splits, TestSet, Transform};
use crate::error::{Error, Result};
use crate::eval::{Evaluation, SettingResult, evaluate, evaluate_as_is};
use crate::files::write_atomic;
use crate::losses::MarginHead;
use crate::machine::Machine;
use crate::models::{Model, ModelConfig};

/// What happens while an experiment runs, for whoever shows it.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The training of an arm begins.
    Start {
        /// Which arm.
        arm: Arm,
        /// Steps it will take.
        num_steps: usize,
        /// Images in the training set, and how many each epoch leaves out because they fill no batch.
        num_images: usize,
        /// See `num_images`.
        num_left_out: usize,
        /// Identities in the training set, and how many it leaves out for having too few images.
        num_identities: usize,
        /// See `num_identities`.
        num_skipped_identities: usize,
    },
    /// Something that the user should know of.
    Notice(String),
    /// A step was taken.
    Step {
        /// Its number, from 1.
        step: usize,
        /// The epoch, from 0.
        epoch: usize,
        /// Its figures.
        report: &'a StepReport,
        /// Images per second since the arm began.
        images_per_s: f64,
        /// Share of that time spent waiting for data.
        wait_share: f64,
    },
    /// Images were embedded for the evaluation.
    Embedded {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// An arm is trained and evaluated.
    Finished {
        /// Which arm.
        arm: Arm,
        /// Its figures.
        evaluation: &'a Evaluation,
    },
}

/// The results of an experiment, with what is needed to repeat it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Version of this crate.
    pub version: &'static str,
    /// Commit it was built from.
    pub commit: &'static str,
    /// Where it ran.
    pub device: String,
    /// Threads of the computation.
    pub threads: usize,
    /// Whose faces it was tested on.
    pub test_set: String,
    /// Every setting, the seed among them.
    pub config: Config,
    /// The teacher that was given instead of trained.
    pub teacher: Option<PathBuf>,
    /// The weights that were given to start from.
    pub start: Option<PathBuf>,
    /// By arm, in the order they ran.
    pub arms: BTreeMap<Arm, ArmOutcome>,
}

/// The result of one arm.
#[derive(Clone, Debug, Serialize)]
pub struct ArmOutcome {
    /// Steps taken; 0 for a given teacher.
    pub num_steps: usize,
    /// Wall-clock seconds of the training, without the evaluation.
    pub seconds: f64,
    /// The loss of the last step.
    pub last_loss: Option<f64>,
    /// The figures on the test set.
    #[serde(flatten)]
    pub evaluation: Evaluation,
    /// The figures on photos with real masks, if the settings name some.
    pub real_masks: Option<SettingResult>,
}

impl Outcome {
    /// Returns the arms' names and figures as the table wants them.
    pub fn rows(&self) -> Vec<(&str, &Evaluation)> {
        self.arms.iter().map(|(arm, outcome)| (arm.title(), &outcome.evaluation)).collect()
    }

    /// Returns the arms' names and figures on real masks, if there are.
    pub fn real_mask_rows(&self) -> Vec<(&str, &SettingResult)> {
        let row = |(arm, outcome)| -> Option<(&str, &SettingResult)> {
            let (arm, outcome): (&Arm, &ArmOutcome) = (arm, outcome);
            Some((arm.title(), outcome.real_masks.as_ref()?))
        };
        self.arms.iter().filter_map(row).collect()
    }
}

/// Arms to train on one data set.
pub struct Experiment {
    config: Config,
    splits: Splits,
    out: PathBuf,
    /// Weights that are given instead of trained.
    teacher: Option<Checkpoint>,
    start: Option<Checkpoint>,
    machine: Machine,
}

impl Experiment {
    /// Opens the data and writes the resolved config to `out/config.toml`.
    ///
    /// # Errors
    /// When a setting is out of range, data is missing or broken, or `out` cannot be written to.
    pub fn new(config: Config, out: &Path) -> Result<Self> {
        config.validate()?;
        let splits = config.data.open()?;
        splits.test.check_images()?;
        splits.real_masks.iter().try_for_each(TestSet::check_images)?;
        std::fs::create_dir_all(out).map_err(Error::io(out))?;
        write_atomic(&out.join("config.toml"), config.to_toml()?.as_bytes())?;
        Ok(Self { config, splits, out: out.to_owned(), teacher: None, start: None, machine: Machine::default() })
    }

    /// Trains and evaluates on another machine than the CPU.
    pub fn on(self, machine: &Machine) -> Self {
        let moved = |checkpoint: Checkpoint| Checkpoint { backbone: checkpoint.backbone.on(machine), ..checkpoint };
        let (teacher, start) = (self.teacher.map(moved), self.start.map(moved));
        Self { machine: machine.clone(), teacher, start, ..self }
    }

    /// Uses this teacher instead of training one.
    pub fn with_teacher(self, teacher: Checkpoint) -> Self {
        let teacher = Checkpoint { backbone: teacher.backbone.on(&self.machine), ..teacher };
        Self { teacher: Some(teacher), ..self }
    }

    /// Starts every arm that is trained from these weights.
    ///
    /// # Errors
    /// When they are of another network than the one that the settings describe.
    pub fn with_start(self, start: Checkpoint) -> Result<Self> {
        // Dropout has no weights.
        let wanted = ModelConfig { dropout: 0.0, ..self.config.model.clone() };
        let found = ModelConfig { dropout: 0.0, ..start.backbone.config().clone() };
        if wanted != found {
            let what = format!("does not fit the model: expected {wanted:?}, found {found:?}");
            return Err(Error::Checkpoint { path: start.path.unwrap_or_default(), what });
        }
        let start = Checkpoint { backbone: start.backbone.on(&self.machine), ..start };
        Ok(Self { start: Some(start), ..self })
    }

    /// Trains and evaluates the arms of the settings, each saved under its name in the results folder; writes
    /// `results.json` there after each.
    ///
    /// # Errors
    /// When an arm needs another that is neither given nor trained before it, or training, saving or evaluation fails.
    pub fn run(&self, on: &mut dyn FnMut(Event)) -> Result<Outcome> {
        self.check()?;
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
            teacher: self.teacher.as_ref().and_then(|t| t.path.clone()),
            start: self.start.as_ref().and_then(|t| t.path.clone()),
            arms: BTreeMap::new(),
        };
        let mut trained = Trained::default();
        let arms = &self.config.train.arms;
        if let Some(teacher) = self.teacher.as_ref().filter(|_| !arms.contains(&Arm::Teacher)) {
            // The students' table compares them with it.
            let (evaluation, real_masks) = self.evaluate(&teacher.backbone, on)?;
            on(Event::Finished { arm: Arm::Teacher, evaluation: &evaluation });
            let result = ArmOutcome { num_steps: 0, seconds: 0.0, last_loss: None, evaluation, real_masks };
            outcome.arms.insert(Arm::Teacher, result);
        }
        for &arm in arms {
            let result = self.run_arm(arm, &mut trained, on)?;
            on(Event::Finished { arm, evaluation: &result.evaluation });
            outcome.arms.insert(arm, result);
            // After every arm: what is finished is not lost to what fails later.
            let json = serde_json::to_vec_pretty(&outcome).map_err(|e| Error::Config(e.to_string()))?;
            write_atomic(&self.out.join("results.json"), &json)?;
        }
        Ok(outcome)
    }

    fn check(&self) -> Result<()> {
        let arms = &self.config.train.arms;
        for (i, &arm) in arms.iter().enumerate() {
            let has = |wanted| arms[..i].contains(&wanted);
            let has_teacher = self.teacher.is_some() || has(Arm::Teacher);
            if arm.distills() && self.config.distill.of(arm).lambda > 0.0 && !has_teacher {
                let what = format!("{} learns from a teacher: give one, or train the teacher arm first", arm.name());
                return Err(Error::Training(what));
            }
            let origin = self.origin(arm);
            match origin {
                Some(Origin::Teacher) if !has_teacher => {
                    let what = format!("{} starts from the teacher: give one, or train it first", arm.name());
                    return Err(Error::Training(what));
                }
                Some(Origin::Lg) if !has(Arm::Lg) => {
                    let what =
                        format!("{} starts from the LG student: give its checkpoint, or train it first", arm.name());
                    return Err(Error::Training(what));
                }
                _ => {}
            }
            let needs_start = self.config.train.batch_norm == BatchNormMode::Frozen
                || self.config.train.head_start == HeadStart::MeanEmbedding;
            if needs_start && origin.is_none() {
                let what = "train.batch_norm = frozen and train.head_start = mean-embedding need weights to start from";
                return Err(Error::Training(format!("{what}: {} has none", arm.name())));
            }
            if self.config.train.start_share > 0.0 && arm != Arm::Teacher && origin.is_none() {
                let what = format!("train.start_share: {} starts from no weights that could have a share", arm.name());
                return Err(Error::Training(what));
            }
        }
        Ok(())
    }

    /// Whose weights an arm starts from, if any.
    fn origin(&self, arm: Arm) -> Option<Origin> {
        if self.start.is_some() {
            return Some(Origin::Given);
        }
        let start = match arm {
            Arm::Teacher => Start::Scratch,
            Arm::Aug | Arm::Lg => self.config.train.start,
            Arm::Hg => self.config.train.hg_start,
        };
        match start {
            Start::Scratch => None,
            Start::Teacher => Some(Origin::Teacher),
            Start::Lg => Some(Origin::Lg),
        }
    }

    fn run_arm(&self, arm: Arm, trained: &mut Trained, on: &mut dyn FnMut(Event)) -> Result<ArmOutcome> {
        let teacher = self.teacher.as_ref().or(trained.teacher.as_ref());
        let start = self.origin(arm).and_then(|origin| {
            let weights = match origin {
                Origin::Given => self.start.as_ref(),
                Origin::Teacher => teacher,
                Origin::Lg => trained.lg.as_ref(),
            };
            Some((origin, weights?))
        });
        let mut trainer = self.trainer(arm, teacher.map(|t| &t.backbone), start, &mut trained.centres, on)?;
        let start = start.map(|(_, weights)| weights);
        let began = Instant::now();
        let (num_steps, last_loss, lg) = self.train(arm, &mut trainer, start, on)?;
        let seconds = began.elapsed().as_secs_f64();
        let checkpoint = frozen(&trainer)?;
        let (evaluation, real_masks) = self.evaluate(&checkpoint.backbone, on)?;
        match arm {
            Arm::Teacher => trained.teacher = Some(checkpoint),
            Arm::Lg => trained.lg = lg,
            Arm::Aug | Arm::Hg => {}
        }
        Ok(ArmOutcome { num_steps, seconds, last_loss: Some(last_loss), evaluation, real_masks })
    }

    fn evaluate(&self, model: &Model, on: &mut dyn FnMut(Event)) -> Result<(Evaluation, Option<SettingResult>)> {
        let mut progress = |done, total| on(Event::Embedded { done, total });
        let evaluation = evaluate(model, &self.splits.test, &self.config.eval, &mut progress)?;
        let real_masks = self.splits.real_masks.as_ref();
        let real_masks = real_masks.map(|test| evaluate_as_is(model, test, &self.config.eval, progress));
        Ok((evaluation, real_masks.transpose()?))
    }

    fn trainer<'a>(
        &self,
        arm: Arm,
        teacher: Option<&'a Model>,
        start: Option<(Origin, &Checkpoint)>,
        centres: &mut BTreeMap<Origin, Tensor>,
        on: &mut dyn FnMut(Event),
    ) -> Result<Trainer<'a>> {
        let config = &self.config;
        let seed = config.train.seed;
        let mut student = Model::new(&config.model, &Device::Cpu, seed)?.on(&self.machine);
        student.params().freeze_statistics(config.train.batch_norm == BatchNormMode::Frozen);
        let classes = self.splits.train.num_identities();
        let size = config.model.embedding_size;
        let head = MarginHead::new(&config.loss, size, classes, &Device::Cpu, seed.wrapping_add(1))?;
        if let Some((origin, start)) = start {
            student = student.with_preprocessing(start.backbone.preprocessing().clone());
            student.params().load(&start.backbone.params().state()?)?;
            match start.header.as_ref().filter(|h| fits(h, size, classes)) {
                Some(header) => head.params().load(header)?,
                // Without the margin loss nobody asks for them.
                None if config.distill.of(arm).margin_weight == 0.0 => {}
                None if config.train.head_start == HeadStart::MeanEmbedding => {
                    let kernel = match centres.entry(origin) {
                        Entry::Occupied(known) => known.into_mut(),
                        Entry::Vacant(unknown) => {
                            let progress = |done, total| on(Event::Embedded { done, total });
                            unknown.insert(mean_embeddings(&start.backbone, self.splits.train.as_ref(), progress)?)
                        }
                    };
                    head.params().load(&BTreeMap::from([("kernel".to_owned(), kernel.clone())]))?;
                }
                None => {
                    let what = format!("no class centres for {classes} identities to start from: they start anew");
                    on(Event::Notice(format!("{}: {what}", arm.name())));
                }
            }
        }
        Trainer::new(student, head, teacher, &config.distill.of(arm), &config.optim, seed)
    }

    /// Returns the steps taken, the last loss and, if HG needs it, the LG student at HG's first epoch.
    fn train(
        &self,
        arm: Arm,
        trainer: &mut Trainer,
        start: Option<&Checkpoint>,
        on: &mut dyn FnMut(Event),
    ) -> Result<(usize, f64, Option<Checkpoint>)> {
        let config = &self.config;
        let augment = match arm {
            Arm::Teacher => AugmentConfig { flip: config.augment.flip, mask: 0.0, ..AugmentConfig::default() },
            _ => config.augment.clone(),
        };
        let transform = Transform::new(&augment, &config.mask)?;
        let train = self.splits.train.clone();
        let loader = Loader::new(train.clone(), transform, &config.loader, config.model.input_size, config.train.seed)?
            .on_broken(config.data.on_broken);
        let (epochs, per_epoch) = (config.epochs(arm), loader.num_batches());
        on(Event::Start {
            arm,
            num_steps: epochs.len() * per_epoch,
            num_images: train.len(),
            num_left_out: loader.num_left_out(),
            num_identities: train.num_identities(),
            num_skipped_identities: train.num_skipped_identities(),
        });
        let base_lr = config.optim.lr * config.loader.batch_size as f64 / config.optim.lr_batch as f64;
        let (began, mut waited, mut step) = (Instant::now(), 0.0, 0);
        let (mut last_loss, mut lg) = (f64::NAN, None);
        for epoch in epochs.clone() {
            if arm == Arm::Lg && config.train.hg_start == Start::Lg && epoch == config.train.hg_first_epoch {
                // Kept, so that a later run can start HG from it.
                let folder = self.out.join(arm.name()).join(format!("epoch-{epoch}"));
                trainer.synchronise()?;
                save_checkpoint(&folder, &trainer.student, trainer.head())?;
                lg = Some(frozen(trainer)?);
            }
            let mut batches = loader.epoch(epoch as u64);
            loop {
                let asked = Instant::now();
                let Some(batch) = batches.next() else { break };
                waited += asked.elapsed().as_secs_f64();
                let scheduled = epochs.start * per_epoch + step;
                let lr = base_lr * config.schedule.factor(scheduled, per_epoch, epochs.end);
                let report = trainer.step(batch?, scheduled as u64, lr)?;
                step += 1;
                let Some(report) = report else { continue };
                let elapsed = began.elapsed().as_secs_f64();
                let images_per_s = (step * config.loader.batch_size) as f64 / elapsed;
                on(Event::Step { step, epoch, report: &report, images_per_s, wait_share: waited / elapsed });
            }
            last_loss = trainer.synchronise()?.loss;
            if let [first, ..] = &batches.broken()[..] {
                let num = batches.broken().len();
                on(Event::Notice(format!("epoch {epoch}: others took the place of {num} broken images: {first}")));
            }
            if let Some(start) = start.filter(|_| config.train.start_share > 0.0 && epoch + 1 == epochs.end) {
                average(&trainer.student, &start.backbone, config.train.start_share)?;
            }
            save_checkpoint(&self.out.join(arm.name()), &trainer.student, trainer.head())?;
        }
        Ok((step, last_loss, lg))
    }
}

/// What later arms of an experiment may need of earlier ones.
#[derive(Default)]
struct Trained {
    teacher: Option<Checkpoint>,
    lg: Option<Checkpoint>,
    /// Mean embeddings as class centres, by the weights that made them.
    centres: BTreeMap<Origin, Tensor>,
}

/// Whose weights an arm starts from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    /// Those of [`Experiment::with_start`].
    Given,
    Teacher,
    Lg,
}

/// The trained weights in a network that builds no graph.
fn frozen(trainer: &Trainer) -> Result<Checkpoint> {
    let student = &trainer.student;
    let backbone = Model::frozen(student.config(), student.params().state()?, &Device::Cpu)?;
    let backbone = backbone.with_preprocessing(student.preprocessing().clone()).on(student.machine());
    let header = trainer.head().map(|head| head.params().state()).transpose()?;
    Ok(Checkpoint { path: None, backbone, header })
}

/// Moves the weights of `model` towards those of `start`, of which they become `share`; counters stay.
fn average(model: &Model, start: &Model, share: f64) -> Result<()> {
    let (mut state, start) = (model.params().state()?, start.params().state()?);
    for (name, weights) in state.iter_mut().filter(|(_, t)| t.dtype().is_float()) {
        *weights = ((&*weights * (1.0 - share))? + (&start[name] * share)?)?;
    }
    Ok(model.params().load(&state)?)
}

/// Whether a head's class centres are of this size; those of other identities are of no use.
fn fits(header: &BTreeMap<String, Tensor>, size: usize, classes: usize) -> bool {
    header.get("kernel").is_some_and(|k| k.dims() == [size, classes])
}
