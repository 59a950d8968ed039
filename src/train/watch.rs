//! Evaluations between epochs: the best weights so far, and early stopping.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::eval::Setting;

/// Settings of evaluations between epochs and of early stopping. By default both are off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchConfig {
    /// Epochs between evaluations; 0 for none before the end.
    pub every: usize,
    /// The setting whose equal error rate decides.
    pub setting: Setting,
    /// Early stopping: number of evaluations in a row without a lower error rate after which an arm stops. The arm then
    /// ends with the weights that had the lowest error rate. 0 turns early stopping off: the arm ends with its last
    /// weights, or their moving average if one is kept.
    pub patience: usize,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self { every: 0, setting: Setting::UM, patience: 0 }
    }
}

/// The evaluation with the lowest error rate so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Epochs before the evaluation, counted from the start of the schedule.
    pub epoch: usize,
    /// Training steps before the evaluation.
    pub step: usize,
    /// Equal error rate in the setting [`WatchConfig::setting`], in `[0, 1]`.
    pub eer: f64,
}

impl WatchConfig {
    /// Checks that the settings are consistent.
    ///
    /// # Errors
    /// When `patience` is set without `every`.
    pub fn validate(&self) -> Result<()> {
        if self.patience > 0 && self.every == 0 {
            let what = "watch.patience: expected watch.every (epochs between evaluations) of 1 or more, found 0";
            return Err(Error::Config(what.to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_needs_evaluations() {
        let config = WatchConfig { patience: 1, ..WatchConfig::default() };
        assert!(config.validate().unwrap_err().to_string().contains("watch.patience"));
    }
}
