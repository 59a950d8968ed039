//! The flags that say how sure figures are.

use anyhow::Result;
use clap::Args;

use crate::eval::BootstrapConfig;

/// How sure figures are.
#[derive(Args, Debug)]
pub struct BootstrapArgs {
    /// How often people are drawn anew for the intervals; 0 for none [default: 1000]
    #[arg(long, value_name = "N")]
    bootstrap: Option<usize>,
    /// Share of the draws inside an interval [default: 0.95]
    #[arg(long, value_name = "SHARE")]
    confidence: Option<f64>,
}

impl BootstrapArgs {
    /// Changes the settings that the flags name.
    pub fn apply(&self, config: &mut BootstrapConfig) {
        config.replicates = self.bootstrap.unwrap_or(config.replicates);
        config.confidence = self.confidence.unwrap_or(config.confidence);
    }

    /// The default settings with what the flags name.
    ///
    /// # Errors
    /// When one is out of range.
    pub fn config(&self) -> Result<BootstrapConfig> {
        let mut config = BootstrapConfig::default();
        self.apply(&mut config);
        config.validate()?;
        Ok(config)
    }
}
