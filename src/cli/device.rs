//! `--device` and `--precision`.

use anyhow::Result;
use clap::Args;

use crate::cli::tell;
use crate::machine::{Choice, Machine, Precision};
use crate::models::Model;

/// Flags for the device and its precision.
#[derive(Args, Debug)]
pub(super) struct DeviceArgs {
    /// Device to run on: auto (a GPU if the build supports it and one is usable, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Choice,
    /// GPU precision: bf16 (the default of training), tf32 (that of everything else), f16 (not in training) or f32; the
    /// CPU always computes in f32
    #[arg(long, value_name = "TYPE")]
    precision: Option<Precision>,
}

/// What a device is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// Training, with evaluations.
    Training,
    /// Embeddings, which thresholds and other machines' embeddings are compared with.
    Inference,
}

impl DeviceArgs {
    /// Opens the device and prints on stderr what is worth saying, such as why `auto` falls back to the CPU.
    pub(super) fn open(&self, work: Work) -> Result<Machine> {
        let precision = self.precision.unwrap_or(match work {
            Work::Training => Precision::Bf16,
            Work::Inference => Precision::Tf32,
        });
        let mut machine = Machine::open(self.device, precision)?;
        machine.take_notices().iter().for_each(|notice| tell(format_args!("{notice}")));
        Ok(machine)
    }

    /// Whether the device is not asked for by name, so that the CPU may take its place.
    pub(super) fn is_auto(&self) -> bool {
        self.device == Choice::Auto
    }

    /// Returns the network to run on `machine`, or on the CPU if that was chosen by `auto` and does not support it.
    pub(super) fn place(&self, model: Model, machine: &Machine) -> Model {
        match model.refusal(machine).filter(|_| self.is_auto()) {
            Some(why) => {
                tell(format_args!("on the CPU: {why}"));
                model
            }
            None => model.on(machine),
        }
    }
}
