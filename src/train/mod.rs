//! Training: settings, the step, the loop over epochs, the four arms of the paper's ablation, checkpoints.

mod arm;
mod centres;
mod checkpoint;
mod config;
mod epochs;
mod on_cpu;
#[cfg(any(test, feature = "cuda"))]
mod on_gpu;
mod outcome;
mod run;
mod state;
mod step;

pub use arm::Arm;
pub use checkpoint::{Checkpoint, save_checkpoint};
pub use config::{BatchNormMode, Config, DistillArms, HeadStart, Start, TrainConfig, preset, preset_names};
pub use outcome::{ArmOutcome, Event, Outcome};
pub use run::{CONFIG_FILE, Experiment};
pub use state::{Position, TrainState, states_folder};
pub use step::{StepReport, Trainer};
