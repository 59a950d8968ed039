//! Evaluation: embeddings, comparison scores and the field's metrics.

mod all_pairs;
mod bootstrap;
mod class;
mod comparisons;
mod config;
mod curve;
mod embed;
mod figures;
mod groups;
mod identification;
mod joined;
mod lfw;
mod masked_faces;
mod metrics;
mod paired;
mod protocol;
mod score_file;
mod similarity;
mod tables;
mod templates;
mod units;

pub use crate::ops::search::dot;
pub use all_pairs::{AllPairs, compare_all_pairs};
pub use bootstrap::{Bootstrap, BootstrapConfig, Difference, Interval, MetricIntervals, Replicate};
pub use comparisons::Comparisons;
pub use config::{EvalConfig, Setting};
pub use curve::{Histogram, OperatingPoint};
pub use embed::{EmbedConfig, Embeddings, embed, embed_with_masks};
pub use figures::{AtFmr, FMR_TARGETS, Figures, SettingResult};
pub use groups::{GroupRates, Groups, group_rates};
pub use identification::{AtFpir, AtRank, FPIR_TARGETS, Identification, Mate, Search, Searches};
pub use joined::join_scores;
pub use lfw::{FoldAccuracy, FoldTar, fold_accuracy, fold_tar_at_far, squared_l2};
pub use masked_faces::MaskedFaces;
pub use metrics::{Metrics, Scores};
pub use paired::{PairedFigure, compare_systems};
pub use protocol::{Evaluation, SettingScores, compare, compare_as_is, evaluate, evaluate_as_is, figures};
pub use score_file::{ImagePairs, ScoreFile, read_scores, write_scores};
pub use tables::{
    TOO_FEW, comparison_table, details, details_of, figure_rows, group_table, identification_table, operating_points,
    table, table_as_is,
};
pub use templates::Templates;
