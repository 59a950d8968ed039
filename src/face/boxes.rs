//! Outputs of detectors, boxes of faces, and the choice among those that overlap.

use crate::data::Landmarks;

/// An output: `(height, width, channels)`.
#[derive(Debug)]
pub(super) struct Maps {
    pub values: Vec<f32>,
    pub width: usize,
}

/// A detection in pixels of the network's input.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Detection {
    /// Left, top, right, bottom.
    pub bounds: [f32; 4],
    /// None by detectors of boxes alone.
    pub landmarks: Option<Landmarks>,
    pub score: f32,
}

/// Keeps the best of each group of overlapping detections, best first: a detection whose overlap with a better one is
/// more than `most` is dropped. `overlap` is that of two detections, in `[0, 1]`.
pub(super) fn suppress(
    mut found: Vec<Detection>,
    most: f32,
    overlap: impl Fn(&Detection, &Detection) -> f32,
) -> Vec<Detection> {
    // A stable sort: equal scores stay in the order of the network's outputs.
    found.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut kept: Vec<Detection> = Vec::new();
    for detection in found {
        if kept.iter().all(|better| overlap(better, &detection) <= most) {
            kept.push(detection);
        }
    }
    kept
}

/// Intersection over union of two boxes, `[left, top, right, bottom]`, whose sides are longer by `extra` than the
/// difference of their ends.
pub(super) fn intersection_over_union(a: [f32; 4], b: [f32; 4], extra: f32) -> f32 {
    let side = |from: f32, to: f32| (to - from + extra).max(0.0);
    let area = |[left, top, right, bottom]: [f32; 4]| side(left, right) * side(top, bottom);
    let shared = side(a[0].max(b[0]), a[2].min(b[2])) * side(a[1].max(b[1]), a[3].min(b[3]));
    let all = area(a) + area(b) - shared;
    if all > 0.0 { shared / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detection(bounds: [f32; 4], score: f32) -> Detection {
        Detection { bounds, landmarks: None, score }
    }

    #[test]
    fn the_best_of_those_that_overlap_is_kept() {
        let of = |a: &Detection, b: &Detection| intersection_over_union(a.bounds, b.bounds, 0.0);
        let found = [
            detection([0.0, 0.0, 10.0, 10.0], 0.7),
            detection([1.0, 0.0, 11.0, 10.0], 0.9),
            detection([20.0, 0.0, 30.0, 10.0], 0.8),
            detection([8.0, 0.0, 18.0, 10.0], 0.6),
        ];
        let kept = suppress(found.to_vec(), 0.3, of);
        assert_eq!(kept.iter().map(|d| d.score).collect::<Vec<_>>(), [0.9, 0.8, 0.6]);
        // The third overlaps the dropped first one alone, so it stays.
        assert_eq!(suppress(found.to_vec(), 0.0, of).len(), 2);
        assert!(suppress(Vec::new(), 0.3, of).is_empty());
    }

    #[test]
    fn overlaps_are_shares_of_the_union() {
        let unit = [0.0, 0.0, 2.0, 2.0];
        assert_eq!(intersection_over_union(unit, unit, 0.0), 1.0);
        assert_eq!(intersection_over_union(unit, [1.0, 0.0, 3.0, 2.0], 0.0), 2.0 / 6.0);
        assert_eq!(intersection_over_union(unit, [2.0, 0.0, 4.0, 2.0], 0.0), 0.0);
        // Boxes that count their last pixel: 3 x 3 each, 2 x 3 shared.
        assert_eq!(intersection_over_union(unit, [1.0, 0.0, 3.0, 2.0], 1.0), 6.0 / 12.0);
        assert_eq!(intersection_over_union([1.0; 4], [1.0; 4], 0.0), 0.0);
        assert_eq!(intersection_over_union([f32::NAN; 4], unit, 0.0), 0.0);
    }
}
