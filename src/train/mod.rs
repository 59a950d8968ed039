//! Training: settings, the training step, the four arms of the paper's ablation, and checkpoints.

mod arm;
mod centres;
mod checkpoint;
mod config;
mod evaluation;
mod experiment;
mod folder;
mod given_weights;
mod guards;
mod inputs;
mod lr_range;
mod outcome;
mod presets;
mod rehearsal;
mod run;

mod start;
mod state;
mod step_config;
mod steps;
mod trainer;
mod training;
mod watch;

pub use arm::Arm;
pub use checkpoint::{Checkpoint, Header, save_checkpoint};
pub use config::{BatchNormMode, CONFIG_FILE, Config, DistillArms, HeadStart, Start, TrainConfig};
pub use experiment::Experiment;
pub use folder::{REPORT_PAGE, RunFolder};
pub use inputs::ChangedData;
pub use lr_range::{LrPoint, LrRange};
pub use outcome::{ArmOutcome, Event, Outcome, PairedTest};
pub use presets::{preset, preset_names};
pub use rehearsal::{MemoryEstimate, Rehearsal};
pub use run::{Progressed, Provenance, Run};
pub use state::{Position, TrainState, states_folder};
pub use step_config::StepConfig;
pub use trainer::{State, Trainer};
pub use watch::{Best, WatchConfig};
