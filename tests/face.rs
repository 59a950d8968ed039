//! Alignment and photos of all kinds. Fixture: tests/fixtures/align.py (OpenCV 5.0.0).

use std::path::Path;

use anyhow::Result;
use maskinv::data::{Landmarks, align_face, read_image};

/// Landmarks of the crops of align.py.
const LANDMARKS: [Landmarks; 3] = [
    [[90.5, 60.25], [130.0, 58.5], [111.0, 82.0], [94.75, 103.5], [127.5, 102.0]],
    [[60.0, 50.0], [150.0, 80.0], [95.0, 115.0], [50.0, 130.0], [125.0, 158.0]],
    [[20.0, 20.0], [33.0, 18.0], [27.5, 25.0], [22.5, 32.0], [33.5, 31.0]],
];

#[test]
fn crops_are_those_of_opencv_within_a_grey_level() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/align");
    let photo = read_image(&folder.join("photo.png"))?;
    for (number, landmarks) in LANDMARKS.iter().enumerate() {
        let expected = read_image(&folder.join(format!("crop_{number}.png")))?;
        let found = align_face(&photo, landmarks)?;
        let differences: Vec<u8> = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).collect();
        let close = differences.iter().filter(|d| **d <= 1).count() as f64 / differences.len() as f64;
        let largest = differences.iter().max();
        println!("crop {number}: {:.3} % within a grey level, largest difference {largest:?}", 100.0 * close);
        assert!(close >= 0.995, "crop {number}: {close}, largest difference {largest:?}");
    }
    Ok(())
}
