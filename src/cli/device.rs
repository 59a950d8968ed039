//! `--device` and `--precision`.

use anyhow::Result;
use clap::Args;

use crate::machine::{Choice, Machine, Precision};

/// What computes, and in what.
#[derive(Args, Debug)]
pub(super) struct DeviceArgs {
    /// auto (a GPU where this build and this machine have a usable one), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Choice,
    /// What a GPU multiplies in: bf16, f16 (not for training), tf32 or f32. The CPU computes in f32
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    precision: Precision,
}

impl DeviceArgs {
    /// Opens the device; says on stderr why it is the CPU where that was not asked for.
    pub(super) fn open(&self) -> Result<Machine> {
        let (machine, notice) = Machine::open(self.device, self.precision)?;
        if let Some(notice) = notice {
            eprintln!("{notice}");
        }
        Ok(machine)
    }
}
