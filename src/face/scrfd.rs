//! SCRFD (Guo et al., ICLR 2022), as insightface reads its outputs: two anchors at each place, distances from it.

use super::boxes::{Detection, Maps, intersection_over_union};

/// Pixels between the places of each level.
pub(super) const STRIDES: [usize; 3] = [8, 16, 32];
/// Faces that each place may predict.
pub(super) const ANCHORS: usize = 2;

/// Returns the faces of one level with at least this score.
pub(super) fn level(scores: &Maps, boxes: &Maps, points: Option<&Maps>, stride: usize, least: f32) -> Vec<Detection> {
    let size = stride as f32;
    let mut found = Vec::new();
    for (i, &score) in scores.values.iter().enumerate() {
        // A NaN is no face.
        if score.is_nan() || score < least {
            continue;
        }
        let place = i / ANCHORS;
        let (x, y) = ((place % scores.width) as f32 * size, (place / scores.width) as f32 * size);
        let [left, top, right, bottom] = std::array::from_fn(|k| boxes.values[4 * i + k] * size);
        let landmarks = points.map(|points| {
            std::array::from_fn(|point| {
                let at = 10 * i + 2 * point;
                [x + points.values[at] * size, y + points.values[at + 1] * size]
            })
        });
        found.push(Detection { bounds: [x - left, y - top, x + right, y + bottom], landmarks, score });
    }
    found
}

/// Overlap of two detections; boxes count their last pixel.
pub(super) fn overlap(a: &Detection, b: &Detection) -> f32 {
    intersection_over_union(a.bounds, b.bounds, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_has_two_anchors_and_distances_from_it() {
        // Two rows of two places; the second anchor of the third place is a face.
        let mut scores = vec![f32::NAN, 0.2, 0.1, 0.0, 0.3, 0.0, 0.0, 0.0];
        scores[5] = 0.7;
        let (mut boxes, mut points) = (vec![9.0; 32], vec![9.0; 80]);
        boxes[20..24].copy_from_slice(&[0.5, 1.0, 1.5, 2.0]);
        points[50..60].copy_from_slice(&[0.0, 0.0, 1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 1.0, -1.0]);
        let [scores, boxes, points] = [scores, boxes, points].map(|values| Maps { values, width: 2 });
        let found = level(&scores, &boxes, Some(&points), 8, 0.5);
        let expected = Detection {
            bounds: [-4.0, 0.0, 12.0, 24.0],
            landmarks: Some([[0.0, 8.0], [8.0, 8.0], [4.0, 12.0], [0.0, 16.0], [8.0, 0.0]]),
            score: 0.7,
        };
        assert_eq!(found, [expected]);
        assert_eq!(overlap(&found[0], &found[0]), 1.0);
    }
}
