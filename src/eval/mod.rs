//! How good a model is: embeddings, comparison scores, and the field's figures.

mod bootstrap;
mod class;
mod comparisons;
mod embed;
mod lfw;
mod metrics;
mod protocol;
mod report;

pub use bootstrap::{Bootstrap, BootstrapConfig, Difference, Interval, MetricIntervals, Replicate};
pub use comparisons::Comparisons;
pub use embed::{EmbedConfig, Embeddings, embed};
pub use lfw::{FoldAccuracy, FoldTar, fold_accuracy, fold_tar_at_far, squared_l2};
pub use metrics::{Metrics, Scores};
pub use protocol::{EvalConfig, Evaluation, Setting, SettingResult, evaluate, evaluate_as_is};
pub use report::{details, table, table_as_is};
