//! Faces in photos: detection with five landmarks. What is found goes to [`align_face`](crate::data::align_face).

mod boxes;
mod detector;
mod resize;
mod scrfd;
mod yunet;

pub use detector::{DetectConfig, Detector, Face};
