//! Checks whether faces are aligned to the 112x112 template.

use image::RgbImage;
use serde::Serialize;

use super::{ALIGNED_LANDMARKS, FACE_SIZE, Landmarks};

/// Side of a crop, in pixels.
const SIDE: usize = FACE_SIZE as usize;
/// Fewest faces whose mean is meaningful.
const MIN_FACES: u64 = 50;
/// Candidate columns for the axis of symmetry, in pixels.
const AXES: std::ops::RangeInclusive<usize> = 36..=76;
/// Rows searched for the eyes.
const EYE_ROWS: std::ops::Range<usize> = 28..76;
/// Distances of an eye's columns from the axis, on either side.
const EYE_COLUMNS: std::ops::Range<usize> = 10..26;
/// Largest offset of the mean face from the template without a warning, in pixels. Crops aligned with different
/// detectors differ by one or two pixels.
const TOLERANCE_PX: f64 = 3.0;
/// Largest mean distance of a face's five landmarks from the template before it counts as misaligned, in pixels.
const MISALIGNED_PX: f64 = 8.0;
/// Horizontal offset of the 96-pixel-wide template's landmarks from the 112-pixel template's.
const OLD_TEMPLATE_SHIFT_PX: f64 = -8.0;

/// Running sum of crops, to compute their mean.
#[derive(Clone)]
pub(super) struct MeanFace {
    sum: Vec<u64>,
    num: u64,
}

impl Default for MeanFace {
    fn default() -> Self {
        Self { sum: vec![0; SIDE * SIDE], num: 0 }
    }
}

/// Position of the mean face. Faces are nearly symmetric and eyes are dark, so this shows that a data set was aligned
/// to another template without needing landmarks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MeanFaceAlignment {
    /// Column of the axis of symmetry, in pixels.
    pub axis_px: f64,
    /// Row of the eyes, in pixels.
    pub eyes_px: f64,
}

impl MeanFace {
    /// Adds a crop.
    pub fn add(&mut self, image: &RgbImage) {
        for (sum, pixel) in self.sum.iter_mut().zip(image.pixels()) {
            *sum += pixel.0.iter().map(|&v| u64::from(v)).sum::<u64>();
        }
        self.num += 1;
    }

    pub fn merge(&mut self, other: &Self) {
        self.sum.iter_mut().zip(&other.sum).for_each(|(a, b)| *a += b);
        self.num += other.num;
    }

    /// Returns the position of the mean face, or `None` for fewer than [`MIN_FACES`] faces.
    pub fn alignment(&self) -> Option<MeanFaceAlignment> {
        if self.num < MIN_FACES {
            return None;
        }
        let mean: Vec<f64> = self.sum.iter().map(|&sum| sum as f64 / (3 * self.num) as f64).collect();
        // In steps of half a pixel: the axis may lie on a column or between two.
        let scores: Vec<(f64, f64)> =
            (2 * AXES.start()..=2 * AXES.end()).map(|twice| (twice as f64 / 2.0, asymmetry(&mean, twice))).collect();
        let axis = lowest(&scores)?;
        let darkness: Vec<(f64, f64)> = EYE_ROWS.map(|row| (row as f64, eye_brightness(&mean, row, axis))).collect();
        Some(MeanFaceAlignment { axis_px: axis, eyes_px: lowest(&darkness)? })
    }
}

/// Mean squared difference between a face and its mirror image about column `twice / 2`, over the columns both have.
fn asymmetry(mean: &[f64], twice: usize) -> f64 {
    let (mut sum, mut num) = (0.0, 0);
    for row in mean.chunks_exact(SIDE) {
        for (column, value) in row.iter().enumerate() {
            if let Some(other) = twice.checked_sub(column).and_then(|at| row.get(at)) {
                sum += (value - other).powi(2);
                num += 1;
            }
        }
    }
    sum / f64::from(num.max(1))
}

/// Brightness of a row at the eyes' columns, relative to the rows above and below: eyes are darker than brow bone and
/// cheek.
fn eye_brightness(mean: &[f64], row: usize, axis: f64) -> f64 {
    let of_row = |row: usize| {
        let columns = EYE_COLUMNS.flat_map(|d| [axis - d as f64, axis + d as f64]).map(|x| x.round() as usize);
        columns.filter_map(|x| mean.get(row * SIDE + x.min(SIDE - 1))).sum::<f64>()
    };
    let band = |rows: std::ops::Range<usize>| {
        let num = rows.len() as f64;
        rows.map(of_row).sum::<f64>() / num
    };
    band(row - 2..row + 3) - 0.5 * (band(row - 14..row - 8) + band(row + 9..row + 15))
}

/// Position of a curve's minimum, refined between the points by a parabola.
fn lowest(curve: &[(f64, f64)]) -> Option<f64> {
    let (at, &(x, y)) = curve.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1))?;
    let neighbours = at.checked_sub(1).and_then(|before| Some((curve.get(before)?, curve.get(at + 1)?)));
    let Some((&(left, before), &(_, after))) = neighbours else { return Some(x) };
    let bend = before - 2.0 * y + after;
    Some(if bend > 0.0 { x + 0.5 * (x - left) * (before - after) / bend } else { x })
}

impl MeanFaceAlignment {
    /// Returns a warning if the mean face is not where the 112x112 template has it.
    pub fn warning(&self) -> Option<String> {
        let [left, right] = [ALIGNED_LANDMARKS[0], ALIGNED_LANDMARKS[1]].map(|p| p.map(f64::from));
        let expected = [0.5 * (left[0] + right[0]), 0.5 * (left[1] + right[1])];
        let shift = [self.axis_px - expected[0], self.eyes_px - expected[1]];
        if shift.iter().all(|d| d.abs() <= TOLERANCE_PX) {
            return None;
        }
        let where_it_is = format!(
            "the mean face has its axis at column {:.1} and its eyes at row {:.1}; the 112x112 template has them at {:.1} and \
             {:.1}",
            self.axis_px, self.eyes_px, expected[0], expected[1]
        );
        Some(format!("{where_it_is}: {}", advice(shift)))
    }
}

/// Likely cause of a shift from the template.
fn advice(shift: [f64; 2]) -> String {
    if (shift[0] - OLD_TEMPLATE_SHIFT_PX).abs() <= TOLERANCE_PX && shift[1].abs() <= TOLERANCE_PX {
        return "the crops were aligned to the template for 96x112 pixels, 8 px to the left; published networks lose much \
                accuracy on them: realign them"
            .to_owned();
    }
    "the crops were aligned to a different template, or not at all; published networks lose accuracy on them".to_owned()
}

/// Distances of a data set's landmarks from the template.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LandmarkAlignment {
    /// Number of images with landmarks.
    pub num_images: usize,
    /// Mean of each landmark's offset from the template, in pixels.
    pub mean_offset_px: [[f64; 2]; 5],
    /// Mean distance of a landmark from the template, in pixels.
    pub mean_distance_px: f64,
    /// Images whose landmarks are over 8 px from the template on average, with that distance, worst first.
    pub misaligned: Vec<(String, f64)>,
}

impl LandmarkAlignment {
    /// Compares the landmarks of named images with the template; `None` if there are no images.
    pub fn measure(landmarks: impl Iterator<Item = (String, Landmarks)>) -> Option<Self> {
        let mut sums = [[0f64; 2]; 5];
        let (mut num_images, mut distances, mut misaligned) = (0, 0.0, Vec::new());
        for (name, points) in landmarks {
            let mut distance = 0.0;
            for ((sum, point), expected) in sums.iter_mut().zip(points).zip(ALIGNED_LANDMARKS) {
                let offset = [0, 1].map(|axis| f64::from(point[axis]) - f64::from(expected[axis]));
                sum.iter_mut().zip(offset).for_each(|(sum, offset)| *sum += offset);
                distance += offset[0].hypot(offset[1]) / 5.0;
            }
            num_images += 1;
            distances += distance;
            if distance > MISALIGNED_PX {
                misaligned.push((name, distance));
            }
        }
        misaligned.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let per_image = |sum: f64| sum / num_images as f64;
        (num_images > 0).then(|| Self {
            num_images,
            mean_offset_px: sums.map(|sum| sum.map(per_image)),
            mean_distance_px: per_image(distances),
            misaligned,
        })
    }

    /// Returns warnings for the user; empty if the landmarks fit the template.
    ///
    /// If `mean_face` is in place but the landmarks are not, the landmarks belong to other images and the crops are
    /// aligned.
    pub fn warnings(&self, mean_face: Option<&MeanFaceAlignment>) -> Vec<String> {
        let mean: [f64; 2] =
            [0, 1].map(|axis| self.mean_offset_px.iter().map(|offset| offset[axis]).sum::<f64>() / 5.0);
        let mut warnings = Vec::new();
        if mean.iter().any(|offset| offset.abs() > TOLERANCE_PX) {
            let away = format!(
                "the landmarks are {:+.1} px across and {:+.1} px down from the template on average",
                mean[0], mean[1]
            );
            let is_face_in_place = mean_face.is_some_and(|face| face.warning().is_none());
            let of_others = is_face_in_place || mean.iter().any(|offset| offset.abs() > 0.3 * SIDE as f64);
            warnings.push(match of_others {
                true => {
                    format!("{away}: they belong to other images than these crops, perhaps the photos before alignment")
                }
                false => format!("{away}: {}", advice(mean)),
            });
        } else if !self.misaligned.is_empty() {
            let share = 100.0 * self.misaligned.len() as f64 / self.num_images as f64;
            warnings.push(format!(
                "{} images ({share:.1} %) have landmarks over {MISALIGNED_PX:.0} px from the template: turned heads, wrong detections, \
                 or crops that are not aligned",
                self.misaligned.len()
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    /// A bright disc with two dark eyes, shifted by `(dx, dy)`.
    fn face(dx: i32, dy: i32) -> RgbImage {
        RgbImage::from_fn(112, 112, |x, y| {
            let (x, y) = (x as i32 - dx, y as i32 - dy);
            let near = |cx: i32, cy: i32, r: i32| (x - cx).pow(2) + (y - cy).pow(2) < r * r;
            let value = match () {
                () if near(38, 52, 7) || near(74, 52, 7) => 50,
                () if near(56, 62, 45) => 190,
                () => 90,
            };
            Rgb([value; 3])
        })
    }

    fn alignment(dx: i32, dy: i32) -> MeanFaceAlignment {
        let mut mean = MeanFace::default();
        (0..60).for_each(|i| mean.add(&face(dx + i % 3 - 1, dy)));
        mean.alignment().expect("enough faces")
    }

    #[test]
    fn the_mean_face_shows_where_faces_are() {
        for (dx, dy) in [(0, 0), (-8, 0), (5, -7), (0, 10)] {
            let found = alignment(dx, dy);
            assert!((found.axis_px - f64::from(56 + dx)).abs() < 1.0, "{dx}, {dy}: {found:?}");
            assert!((found.eyes_px - f64::from(52 + dy)).abs() < 2.0, "{dx}, {dy}: {found:?}");
        }
        assert_eq!(alignment(0, 0).warning(), None);
        assert!(alignment(-8, 0).warning().is_some_and(|w| w.contains("96x112")));
        assert!(alignment(0, 10).warning().is_some_and(|w| w.contains("different template")));
        assert!(MeanFace::default().alignment().is_none());
    }

    #[test]
    fn landmarks_are_compared_with_the_template() -> Result<(), &'static str> {
        let moved = |dx: f32| ALIGNED_LANDMARKS.map(|p| [p[0] + dx, p[1]]);
        let measure = |shifts: &[f32]| {
            let named = shifts.iter().enumerate().map(|(i, &dx)| (format!("{i}"), moved(dx)));
            LandmarkAlignment::measure(named).ok_or("images")
        };
        let good = measure(&[0.5, -0.5, 1.0])?;
        assert!(good.warnings(None).is_empty() && (good.mean_distance_px - 2.0 / 3.0).abs() < 1e-4);
        let old = measure(&[-8.0, -8.2, -7.8])?;
        assert!(old.warnings(None)[0].contains("96x112"), "{:?}", old.warnings(None));
        assert!(measure(&[80.0, 60.0])?.warnings(None)[0].contains("belong to other images"));
        let in_place = MeanFaceAlignment { axis_px: 56.0, eyes_px: 51.0 };
        assert!(old.warnings(Some(&in_place))[0].contains("belong to other images"));
        let one = measure(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.5])?;
        assert_eq!(one.misaligned.len(), 1);
        assert!(one.misaligned[0].0 == "6" && one.warnings(None)[0].starts_with("1 images (14.3 %)"));
        assert!(LandmarkAlignment::measure(std::iter::empty()).is_none());
        Ok(())
    }
}
