//! What an arm starts from: its network, weights and class centres.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use candle_core::{Device, Tensor};

use super::arm::Arm;
use super::centres::mean_embeddings;
use super::checkpoint::{Checkpoint, Header, KERNEL};
use super::config::{BatchNormMode, HeadStart, Start};
use super::inputs::ChangedData;
use super::outcome::Event;
use super::run::Experiment;
use super::state::TrainState;
use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::losses::MarginHead;
use crate::models::Model;

/// Origin of the weights that an arm starts from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// The weights given to [`Experiment::with_start`].
    Given,
    Teacher,
    Lg,
}

impl Experiment {
    /// Checks that each of `arms` has the teacher and the weights it needs.
    pub(super) fn check(&self, arms: &[Arm]) -> Result<()> {
        let side = self.config.model.input_size;
        if let Some(teacher) = self.teacher.as_ref().filter(|_| arms.iter().any(|arm| arm.distills()))
            && teacher.backbone.config().input_size != side
        {
            let found = teacher.backbone.config().input_size;
            let what = format!("expected a teacher for images of {side} pixels (model.input_size), found {found}");
            return Err(Error::Checkpoint { path: teacher.name.clone().into(), what });
        }
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
            if !self.config.train.freeze.is_empty() && arm != Arm::Teacher && origin.is_none() {
                let what = format!("train.freeze: {} starts from random weights, not from a model", arm.name());
                return Err(Error::Training(what));
            }
            if self.config.train.start_share > 0.0 && arm != Arm::Teacher && origin.is_none() {
                let what = format!("train.start_share: {} starts from random weights, not from a model", arm.name());
                return Err(Error::Training(what));
            }
        }
        Ok(())
    }

    /// Returns the origin of the weights that an arm starts from; none if it starts from random weights.
    pub(super) fn origin(&self, arm: Arm) -> Option<Origin> {
        if self.start.is_some() {
            return Some(Origin::Given);
        }
        let start = match arm {
            Arm::Teacher => Start::Scratch,
            Arm::Aug | Arm::Lg | Arm::Distill => self.config.train.start,
            Arm::Hg => self.config.train.hg_start,
        };
        match start {
            Start::Scratch => None,
            Start::Teacher => Some(Origin::Teacher),
            Start::Lg => Some(Origin::Lg),
        }
    }

    pub(super) fn trainer(
        &self,
        arm: Arm,
        teacher: Option<&Model>,
        start: Option<(Origin, &Checkpoint)>,
        state: Option<&TrainState>,
        centres: &mut BTreeMap<Origin, Tensor>,
        on: &mut dyn FnMut(Event),
    ) -> Result<Trainer> {
        let config = &self.config;
        let seed = config.train.seed;
        let mut student = Model::new(&config.model, &Device::Cpu, seed)?.on(&self.machine);
        student.params().freeze_statistics(config.train.batch_norm == BatchNormMode::Frozen);
        if start.is_some() {
            student.freeze(&config.train.freeze)?;
        }
        let train = self.train_set(arm);
        let classes = train.num_identities();
        let size = config.model.embedding_size;
        let head = MarginHead::new(&config.loss, size, classes, &Device::Cpu, seed.wrapping_add(1))?;
        if let Some((origin, start)) = start {
            student = student.with_preprocessing(start.backbone.preprocessing().clone());
            student.params().load(&start.backbone.params().state()?)?;
            match start.header.as_ref().filter(|h| config.train.keep_head && fits(h, size, classes)) {
                // The resumed arm's own class centres are loaded below.
                _ if state.is_some() => {}
                Some(header) => {
                    if header.identities.is_none() {
                        on(Event::Notice(format!(
                            "{}: the class centres of {} have no names, they are taken in the order of the data's people",
                            arm.name(),
                            start.name
                        )));
                    }
                    let loaded = match (header.arranged(&train.identity_names()), self.changed_data) {
                        (Ok(arranged), _) => arranged,
                        (Err(_), ChangedData::Accept) => header.tensors.clone(),
                        (Err(what), ChangedData::Refuse) => {
                            let what = format!(
                                "its class centres are of other people: {what}; start without them (--set \
                                 train.keep_head=false) or accept them (--accept-changed-data)"
                            );
                            return Err(Error::Checkpoint { path: start.name.clone().into(), what });
                        }
                    };
                    head.params().load(&loaded)?;
                }
                // Class centres are used by the margin loss alone.
                None if config.distill.of(arm).margin_weight == 0.0 => {}
                None if config.train.head_start == HeadStart::MeanEmbedding => {
                    let kernel = match centres.entry(origin) {
                        Entry::Occupied(known) => known.into_mut(),
                        Entry::Vacant(unknown) => {
                            let progress = |done, total| on(Event::Embedded { done, total });
                            unknown.insert(mean_embeddings(&start.backbone, train.as_ref(), progress)?)
                        }
                    };
                    head.params().load(&BTreeMap::from([("kernel".to_owned(), kernel.clone())]))?;
                }
                None => {
                    let what = format!("no class centres for {classes} identities to start from: using random ones");
                    on(Event::Notice(format!("{}: {what}", arm.name())));
                }
            }
        }
        if let (Some(state), Some(dropout)) = (state, student.params().dropout()) {
            dropout.skip_to(state.position.dropout_words);
        }
        let mut trainer = Trainer::new(student, head, teacher, &config.step(arm))?;
        if let Some(state) = state {
            trainer.load_state(&state.tensors)?;
        }
        Ok(trainer)
    }
}

/// Whether a head has `classes` centres of length `size`.
fn fits(header: &Header, size: usize, classes: usize) -> bool {
    header.tensors.get(KERNEL).is_some_and(|k| k.dims() == [size, classes])
}
