//! `--device` and `--precision`.

use std::ops::Deref;

use anyhow::Result;
use clap::Args;

use crate::cli::launch::rank_on_machine;
use crate::cli::tell;
use crate::machine::{Choice, Machine, Precision};
use crate::models::{Arch, Model};

/// Flags for the device and its precision.
#[derive(Args, Debug)]
pub(super) struct DeviceArgs {
    /// Device to run on: auto (a GPU if the build supports it and one is usable, else the CPU), cpu, cuda or cuda:N,
    /// which is the first of the GPUs if several ranks run on a machine
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

/// An open device. Prints on stderr what is worth saying: when it is opened, such as why `auto` falls back to the CPU,
/// and when it is dropped, such as that the library lacked an algorithm.
pub(super) struct Opened(Machine);

impl Opened {
    fn tell(&self) {
        self.0.take_notices().iter().for_each(|notice| tell(format_args!("{notice}")));
    }
}

impl Deref for Opened {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.tell();
    }
}

/// Says that a network of another architecture does not use the machine's GPU.
pub(super) fn tell_of_runtime(model: &Model, machine: &Machine) {
    if model.config().arch == Arch::Onnx && !machine.is_cpu() {
        tell(format_args!("a network of another architecture computes on the CPU: its runtime has no other device"));
    }
}

impl DeviceArgs {
    /// Opens the device.
    pub(super) fn open(&self, work: Work) -> Result<Opened> {
        let precision = self.precision.unwrap_or(match work {
            Work::Training => Precision::Bf16,
            Work::Inference => Precision::Tf32,
        });
        let opened = Opened(Machine::open(self.device.of_rank(rank_on_machine()), precision)?);
        opened.tell();
        Ok(opened)
    }

    /// Whether the device is not asked for by name, so that the CPU may take its place.
    pub(super) fn is_auto(&self) -> bool {
        self.device == Choice::Auto
    }

    /// Returns the network to run on `machine`, or on the CPU if that was chosen by `auto` and does not support it.
    pub(super) fn place(&self, model: Model, machine: &Machine) -> Model {
        tell_of_runtime(&model, machine);
        match model.refusal(machine).filter(|_| self.is_auto()) {
            Some(why) => {
                tell(format_args!("on the CPU: {why}"));
                model.on(&Machine::default().with_ranks(machine.ranks()))
            }
            None => model.on(machine),
        }
    }
}
