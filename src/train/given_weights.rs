//! Weights that an experiment is given, and which of them each arm starts from.

use std::collections::BTreeSet;

use super::arm::Arm;
use super::checkpoint::Checkpoint;
use super::config::{BatchNormMode, Config, HeadStart, Start};
use crate::error::{Error, Result};
use crate::machine::Machine;

/// Weights given to an experiment.
#[derive(Default)]
pub(super) struct GivenWeights {
    /// Used instead of training a teacher.
    pub teacher: Option<Checkpoint>,
    /// Every trained arm starts from these.
    pub start: Option<Checkpoint>,
}

/// Origin of the weights that an arm starts from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// [`GivenWeights::start`].
    Given,
    Teacher,
    Lg,
}

impl GivenWeights {
    /// Returns the weights, to run on `machine`.
    pub fn on(self, machine: &Machine) -> Self {
        let moved = |weights: Option<Checkpoint>| weights.map(|weights| weights.on(machine));
        Self { teacher: moved(self.teacher), start: moved(self.start) }
    }

    /// Returns the origin of the weights that an arm starts from; none if it starts from random weights.
    pub fn origin(&self, config: &Config, arm: Arm) -> Option<Origin> {
        if self.start.is_some() {
            return Some(Origin::Given);
        }
        let start = match arm {
            Arm::Teacher => Start::Scratch,
            Arm::Aug | Arm::Lg | Arm::Distill | Arm::Ada | Arm::Soup => config.train.start,
            Arm::Hg => config.train.hg_start,
        };
        match start {
            Start::Scratch => None,
            Start::Teacher => Some(Origin::Teacher),
            Start::Lg => Some(Origin::Lg),
        }
    }

    /// Checks that each of `arms` has the teacher and the weights it needs, and labels of `num_classes` classes.
    ///
    /// # Errors
    /// Names the first arm that lacks something.
    pub fn check(&self, config: &Config, arms: &[Arm], num_classes: usize) -> Result<()> {
        let side = config.model.input_size;
        if let Some(teacher) = self.teacher.as_ref().filter(|_| arms.iter().any(|arm| arm.distills()))
            && teacher.backbone.config().input_size != side
        {
            let found = teacher.backbone.config().input_size;
            let what = format!("expected a teacher for images of {side} pixels (model.input_size), found {found}");
            return Err(Error::Checkpoint { path: teacher.name.clone().into(), what });
        }
        let wrong = |what: String| Err(Error::Training(what));
        for (i, &arm) in arms.iter().enumerate() {
            let (name, has) = (arm.name(), |wanted| arms[..i].contains(&wanted));
            if arm == Arm::Soup {
                let origins = config.train.soup.iter().map(|member| self.origin(config, *member));
                if origins.collect::<BTreeSet<_>>().len() > 1 {
                    return wrong(format!("{name}: expected arms that start from the same weights (train.soup)"));
                }
                continue;
            }
            let has_teacher = self.teacher.is_some() || has(Arm::Teacher);
            if config.distill.of(arm).needs_teacher() && !has_teacher {
                return wrong(format!("{name} learns from a teacher: give one, or train the teacher arm first"));
            }
            if config.distill.of(arm).has_margin() && num_classes == 0 {
                return wrong(format!(
                    "{name} has a margin loss, which needs labels, but no image has one (data.labels)"
                ));
            }
            let origin = self.origin(config, arm);
            match origin {
                Some(Origin::Teacher) if !has_teacher => {
                    return wrong(format!("{name} starts from the teacher: give one, or train it first"));
                }
                Some(Origin::Lg) if !has(Arm::Lg) => {
                    return wrong(format!("{name} starts from the LG student: give its checkpoint, or train it first"));
                }
                _ => {}
            }
            let needs_start =
                config.train.batch_norm == BatchNormMode::Frozen || config.train.head_start == HeadStart::MeanEmbedding;
            if needs_start && origin.is_none() {
                let what = "train.batch_norm = frozen and train.head_start = mean-embedding need weights to start from";
                return wrong(format!("{what}: {name} has none"));
            }
            if !config.train.freeze.is_empty() && arm != Arm::Teacher && origin.is_none() {
                return wrong(format!("train.freeze: {name} starts from random weights, not from a model"));
            }
            if config.train.start_share > 0.0 && arm != Arm::Teacher && origin.is_none() {
                return wrong(format!("train.start_share: {name} starts from random weights, not from a model"));
            }
        }
        Ok(())
    }
}
