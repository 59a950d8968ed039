//! YuNet (Wu, Peng and Yu, Machine Intelligence Research 2023), as OpenCV's `FaceDetectorYN` reads its outputs.

use super::boxes::{Detection, Maps, intersection_over_union};

/// Pixels between the places of each level.
pub(super) const STRIDES: [usize; 3] = [8, 16, 32];
/// Names of the outputs of a level, without its stride: class, whether there is an object, box, landmarks.
pub(super) const OUTPUTS: [(&str, usize); 4] = [("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)];

/// Returns the faces of one level with at least this score.
pub(super) fn level([classes, objects, boxes, points]: [&Maps; 4], stride: usize, least: f32) -> Vec<Detection> {
    let size = stride as f32;
    let mut found = Vec::new();
    for (i, (class, object)) in classes.values.iter().zip(&objects.values).enumerate() {
        let score = (class.clamp(0.0, 1.0) * object.clamp(0.0, 1.0)).sqrt();
        // A NaN is no face.
        if score.is_nan() || score < least {
            continue;
        }
        let (row, column) = ((i / classes.width) as f32, (i % classes.width) as f32);
        let [x, y, w, h] = std::array::from_fn(|k| boxes.values[4 * i + k]);
        let (x, y) = ((column + x) * size, (row + y) * size);
        let (w, h) = (w.exp() * size, h.exp() * size);
        let landmarks = std::array::from_fn(|point| {
            let at = 10 * i + 2 * point;
            [(points.values[at] + column) * size, (points.values[at + 1] + row) * size]
        });
        let bounds = [x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0];
        found.push(Detection { bounds, landmarks: Some(landmarks), score });
    }
    found
}

/// Overlap of two detections, measured in whole pixels.
pub(super) fn overlap(a: &Detection, b: &Detection) -> f32 {
    let whole = |[left, top, right, bottom]: [f32; 4]| {
        let (x, y) = (left.trunc(), top.trunc());
        [x, y, x + (right - left).trunc(), y + (bottom - top).trunc()]
    };
    intersection_over_union(whole(a.bounds), whole(b.bounds), 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(values: Vec<f32>) -> Maps {
        Maps { values, width: 3 }
    }

    #[test]
    fn places_become_boxes_and_points_of_the_photo() {
        // Six places in two rows; the one in the second row's last column is a face.
        let mut objects = vec![0.0; 6];
        objects[5] = 0.81;
        let (mut boxes, mut points) = (vec![9.0; 24], vec![9.0; 60]);
        boxes[20..].copy_from_slice(&[0.5, 0.25, 0.0, 2f32.ln()]);
        points[50..].copy_from_slice(&[0.0, 0.0, 1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 1.0, 1.0]);
        let [classes, objects, boxes, points] = [vec![2.0; 6], objects, boxes, points].map(maps);
        let found = level([&classes, &objects, &boxes, &points], 16, 0.6);
        assert_eq!(found.len(), 1);
        let Detection { bounds, landmarks, score } = &found[0];
        assert!((score - 0.9).abs() < 1e-6, "a class above 1 counts as 1: {score}");
        // Centre (2.5, 1.25) and sides (1, 2), times 16.
        for (found, expected) in bounds.iter().zip([32.0, 4.0, 48.0, 36.0]) {
            assert!((found - expected).abs() < 1e-4, "{bounds:?}");
        }
        assert_eq!(*landmarks, Some([[32.0, 16.0], [48.0, 16.0], [40.0, 24.0], [32.0, 32.0], [48.0, 32.0]]));
        assert!(level([&classes, &objects, &boxes, &points], 16, 0.91).is_empty());
        let nan = maps(vec![f32::NAN; 6]);
        assert!(level([&nan, &objects, &boxes, &points], 16, 0.0).is_empty(), "a NaN is no face");
    }

    #[test]
    fn overlaps_are_those_of_whole_pixels() {
        let at = |left: f32, score: f32| Detection { bounds: [left, 0.0, left + 10.0, 10.0], landmarks: None, score };
        assert_eq!(overlap(&at(0.0, 0.9), &at(5.0, 0.8)), 5.0 / 15.0);
        assert_eq!(overlap(&at(0.0, 0.9), &at(6.0, 0.8)), 4.0 / 16.0);
        assert_eq!(overlap(&at(0.9, 0.9), &at(6.0, 0.8)), 4.0 / 16.0, "0.9 counts as 0");
    }
}
