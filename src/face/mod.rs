//! Faces in photos: detection with five landmarks, and aligned crops of them.

mod boxes;
mod config;
mod crops;
mod detector;
mod photos;
mod quality;
mod resize;
mod scrfd;
mod search;
mod yunet;

pub use config::DetectConfig;
pub use crops::{Crop, CropConfig, CropCounts, Cropper, ImageKind, Which};
pub use detector::Detector;
pub use photos::Photos;
pub use quality::sharpness;
pub use search::Face;
