//! Training: settings, the training step, the epoch loop, the four arms of the paper's ablation, and checkpoints.

mod arm;
mod centres;
mod checkpoint;
mod config;
mod ema;
mod epochs;
mod evaluation;
mod figures;
mod folder;
#[cfg(any(test, feature = "cuda"))]
mod gpu_ema;
mod guards;
mod inputs;
mod lr_range;
mod on_cpu;
#[cfg(any(test, feature = "cuda"))]
mod on_gpu;
mod others;
mod outcome;
mod presets;
mod records;
mod rehearsal;
mod run;
mod runs;
mod start;
mod state;
mod step;
mod watch;

pub use arm::Arm;
pub use checkpoint::{Checkpoint, Header, save_checkpoint};
pub use config::{BatchNormMode, Config, DistillArms, HeadStart, Start, TrainConfig};
pub use evaluation::PairedTest;
pub use folder::{REPORT_PAGE, RunFolder};
pub use inputs::ChangedData;
pub use lr_range::{LrPoint, LrRange};
pub use outcome::{ArmOutcome, Event, Outcome};
pub use presets::{preset, preset_names};
pub use records::{EvaluationRecord, StepRecord, read_evaluations, read_steps};
pub use rehearsal::{MemoryEstimate, Rehearsal};
pub use run::{CONFIG_FILE, Experiment};
pub use runs::{Progressed, Provenance, Run};
pub use state::{Position, TrainState, states_folder};
pub use step::{StepConfig, StepReport, Trainer};
pub use watch::{Best, WatchConfig};
