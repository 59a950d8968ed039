//! Training: settings, the step, the loop over epochs, the four arms of the paper's ablation, checkpoints.

mod arm;
mod checkpoint;
mod config;
mod run;
mod step;

pub use arm::Arm;
pub use checkpoint::{Checkpoint, load_backbone, load_checkpoint, save_checkpoint};
pub use config::{Config, DistillArms, Start, TrainConfig, preset, preset_names};
pub use run::{ArmOutcome, Event, Experiment, Outcome};
pub use step::{StepReport, Trainer};
