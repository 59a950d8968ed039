//! `--bootstrap` and `--confidence`.

use anyhow::Result;
use clap::Args;

use crate::eval::BootstrapConfig;

/// Flags for the confidence intervals.
#[derive(Args, Debug)]
pub struct BootstrapArgs {
    /// Number of bootstrap resamples for the confidence intervals; 0 for none [default: 1000]
    #[arg(long, value_name = "N")]
    bootstrap: Option<usize>,
    /// Confidence level of the intervals, at least 0.5 and below 1 [default: 0.95]
    #[arg(long, value_name = "SHARE")]
    confidence: Option<f64>,
}

impl BootstrapArgs {
    /// Overrides the settings whose flags are given.
    pub fn apply(&self, config: &mut BootstrapConfig) {
        config.replicates = self.bootstrap.unwrap_or(config.replicates);
        config.confidence = self.confidence.unwrap_or(config.confidence);
    }

    /// Returns the default settings, overridden by the flags.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn config(&self) -> Result<BootstrapConfig> {
        let mut config = BootstrapConfig::default();
        self.apply(&mut config);
        config.validate()?;
        Ok(config)
    }
}
