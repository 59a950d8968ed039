//! Faces for training and testing: folders, lists of pairs, procedural faces, synthetic masks, batches.

mod cache;
mod conditions;
mod decode;
mod folder;
mod loader;
pub mod mask;
mod pairs;
mod photo_pairs;
mod pixels;
mod procedural;
mod sample;
mod source;
mod transform;

pub use cache::Cached;
pub use decode::{is_image, read_face, read_image};
pub use folder::{FaceFolder, FolderFilter};
pub use loader::{Batch, Batches, Loader, LoaderConfig};
pub use pairs::{ImageId, Pair, PairEntry, PairList, People, Person, sample_pairs};
pub use photo_pairs::read_photo_pairs;
pub use pixels::Pixels;
pub use procedural::{ProceduralConfig, ProceduralFaces};
pub use sample::{ALIGNED_LANDMARKS, Dataset, FACE_SIZE, Landmarks, Sample};
pub use source::{DataConfig, ProceduralTest, Splits, TestSet};
pub use transform::{AugmentConfig, Transform, Views, mask_landmarks};
