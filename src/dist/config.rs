//! Settings of the ranks.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Settings of a training on several ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RanksConfig {
    /// Type of the gradients on their way between ranks.
    pub gradients: Wire,
    /// Gradients that are sent together, in KiB: each bucket is sent as soon as the backward pass has computed it.
    pub bucket_kib: usize,
    /// Seconds that a rank waits for the others before all end.
    pub timeout_s: u64,
}

/// Type of numbers on their way between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// 32 bits.
    #[default]
    F32,
    /// Half as many bytes with 8 bits of mantissa. By MPI, sums are f32 and are rounded once more on their way back;
    /// NCCL adds in bf16.
    Bf16,
}

impl Default for RanksConfig {
    /// Buckets of 25 MiB, as PyTorch's `DistributedDataParallel` has.
    fn default() -> Self {
        Self { gradients: Wire::default(), bucket_kib: 25 * 1024, timeout_s: 300 }
    }
}

impl RanksConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(1..=1 << 20).contains(&self.bucket_kib) {
            let what = format!("ranks.bucket_kib: expected 1 to {}, found {}", 1 << 20, self.bucket_kib);
            return Err(Error::Config(what));
        }
        if !(1..=86_400).contains(&self.timeout_s) {
            return Err(Error::Config(format!("ranks.timeout_s: expected 1 to 86400, found {}", self.timeout_s)));
        }
        Ok(())
    }
}
