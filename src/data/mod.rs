//! Data sets for training and evaluation: image formats, pair lists, procedural faces, synthetic masks and batches.

mod align;
mod alignment_check;
mod beside;
mod bilinear;
mod cache;
mod check;
mod conditions;
mod cross_pairs;
mod dataset;
mod decode;
mod encode;
mod exif;
mod fingerprint;
mod formats;
mod image_files;
mod jpeg;
mod landmark_list;
mod loader;
pub mod mask;
mod pairs;
mod photo_pairs;
mod procedural;
mod sample;
mod sampling;
mod splits;
mod subset;
mod template_set;
mod test_set;
mod transform;
mod unlabelled;

pub use crate::preprocessing::Pixels;
pub use align::{align_face, align_face_to};
pub use alignment_check::{LandmarkAlignment, MeanFaceAlignment};
pub use cache::Cached;
pub use check::{Duplicates, Findings, check};
pub use cross_pairs::{csv_list, lfw_list, sample_cross_pairs};
pub use dataset::Dataset;
pub(crate) use dataset::of_inner;
pub use decode::{decode_face, decode_image, is_image, is_other_image, read_face, read_image, read_image_file};
pub use encode::{encode_image, output_format, write_image};
pub use fingerprint::{Fingerprint, PersonFingerprint, SplitsFingerprint, TestFingerprint};
pub use formats::{
    Export, FaceFolder, Format, ListedFaces, RecordFaces, ShardFaces, Source, VerificationFaces, check_records,
    is_junk, open_source, open_source_with, write_folder, write_index, write_records, write_shards, write_verification,
};
#[cfg(feature = "parquet")]
pub use formats::{ParquetFaces, write_parquet};
pub use image_files::ImageFiles;
pub use landmark_list::{read_conditions, read_landmarks, rows_without_images};
pub use loader::{Batch, Batches, Loader, LoaderConfig};
pub use pairs::{ImageId, Pair, PairEntry, PairList, People, Person, sample_pairs};
pub use photo_pairs::read_photo_pairs;
pub use procedural::{ProceduralConfig, ProceduralFaces};
pub use sample::{ALIGNED_LANDMARKS, FACE_SIZE, Landmarks, Sample};
pub use splits::{DataConfig, Labels, OnBroken, ProceduralTest, Splits};
pub use subset::{IdentityFilter, Subset};
pub use template_set::{Gallery, PersonTemplate, TemplateImage, TemplatePair, TemplateSet};
pub use test_set::TestSet;
pub use transform::{AugmentConfig, Transform, Views, mask_landmarks};
pub use unlabelled::Unlabelled;
