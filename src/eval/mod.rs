//! How good a model is: embeddings, comparison scores, and the field's figures.

mod bootstrap;
mod class;
mod comparisons;
mod embed;
mod figures;
mod groups;
mod lfw;
mod metrics;
mod paired;
mod protocol;
mod report;
mod score_file;

pub use bootstrap::{Bootstrap, BootstrapConfig, Difference, Interval, MetricIntervals, Replicate};
pub use comparisons::Comparisons;
pub use embed::{EmbedConfig, Embeddings, embed};
pub use figures::{AtFmr, FMR_TARGETS, Figures, SettingResult};
pub use groups::{GroupRates, group_rates};
pub use lfw::{FoldAccuracy, FoldTar, fold_accuracy, fold_tar_at_far, squared_l2};
pub use metrics::{Metrics, Scores};
pub use paired::{PairedFigure, compare_systems};
pub use protocol::{
    EvalConfig, Evaluation, Setting, SettingScores, compare, compare_as_is, evaluate, evaluate_as_is, figures,
};
pub use report::{comparison_table, details, details_of, group_table, operating_points, table, table_as_is};
pub use score_file::{ScoreFile, read_scores, write_scores};
