//! `--device` and `--precision`.

use anyhow::Result;
use clap::Args;

use crate::cli::tell;
use crate::machine::{Choice, Machine, Precision};

/// Flags for the device and its precision.
#[derive(Args, Debug)]
pub(super) struct DeviceArgs {
    /// Device to run on: auto (a GPU if the build supports it and one is usable, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Choice,
    /// GPU precision: bf16, f16 (inference only), tf32 or f32; the CPU always computes in f32
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    precision: Precision,
}

impl DeviceArgs {
    /// Opens the device; if `auto` falls back to the CPU, prints the reason on stderr.
    pub(super) fn open(&self) -> Result<Machine> {
        let (machine, notice) = Machine::open(self.device, self.precision)?;
        if let Some(notice) = notice {
            tell(format_args!("{notice}"));
        }
        Ok(machine)
    }
}
