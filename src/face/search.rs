//! The search for faces of all sizes in a photo: at several sizes of it, in tiles where it is large.

use std::borrow::Cow;

use image::{RgbImage, imageops};
use serde::{Deserialize, Serialize};

use super::boxes::Detection;
use super::config::DetectConfig;
use super::detector::Detector;
use super::resize::resize;
use crate::data::Landmarks;
use crate::error::{Error, Result};

/// Side in pixels of the smallest face that a detector finds reliably: the finest level of both families has a place
/// every 8 pixels.
const SMALLEST_PX: f32 = 16.0;
/// Side of a tile and what two neighbours share, in pixels. A face larger than what they share is found at half the
/// size.
const TILE: usize = 640;
const SHARED: usize = 160;
/// A box that comes this close to the edge of a tile inside the photo, in pixels, may be a part of a face.
const EDGE_PX: f32 = 2.0;
/// Border of a photo in which nothing was found, as a share of its longer side, and the size at which it is searched,
/// as a share of the first. Detectors learn faces with what is around them.
const BORDER: f64 = 0.3;
const BORDERED: f64 = 0.75;
/// Most tiles of a photo.
const MAX_TILES: usize = 2000;

/// A face in a photo, in its pixels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Face {
    /// Left, top, right and bottom edge; may lie outside the photo.
    pub bounds: [f32; 4],
    /// Eyes, tip of the nose and corners of the mouth, the one on the left of the picture first; none by detectors of
    /// boxes alone.
    pub landmarks: Option<Landmarks>,
    /// Score in `[0, 1]`.
    pub score: f32,
}

impl Face {
    /// Returns the landmarks, by which a face is aligned.
    ///
    /// # Errors
    /// When the detector gives boxes alone.
    pub fn points(&self) -> Result<&Landmarks> {
        let missing =
            || Error::Detection("the detector gives boxes alone: expected one with five landmarks".to_owned());
        self.landmarks.as_ref().ok_or_else(missing)
    }
}

impl Detector {
    /// Returns the faces of a photo, the surest first.
    ///
    /// # Errors
    /// When the photo is empty, or too large to be searched as it is or in tiles.
    pub fn detect(&self, photo: &RgbImage, config: &DetectConfig) -> Result<Vec<Face>> {
        config.validate()?;
        let longer = photo.width().max(photo.height()) as f64;
        let first = config.longer_side.map_or(1.0, |side| (side as f64 / longer).min(1.0));
        let mut found = self.at_scale(photo, first, 0.0, config)?;
        let whole = config.longer_side.map_or(1.0, |side| side as f64 / longer);
        if config.looks_again {
            let more = self.at_scale(photo, whole / 2.0, 0.0, config)?;
            self.add(&mut found, more, config);
        }
        for scale in finer(first, config.min_face) {
            let more = self.in_tiles(photo, scale, config)?;
            self.add(&mut found, more, config);
        }
        if config.looks_again && found.is_empty() {
            found = self.at_scale(photo, BORDERED * whole / (1.0 + 2.0 * BORDER), BORDER, config)?;
        }
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        let face = |Detection { bounds, landmarks, score }| Face { bounds, landmarks, score };
        Ok(found.into_iter().map(face).collect())
    }

    /// Adds the detections of a further look that overlap none that is there. A face that was found before stays as it
    /// was: which of two nearly equal scores is higher, and with it the points, would depend on roundings.
    fn add(&self, found: &mut Vec<Detection>, more: Vec<Detection>, config: &DetectConfig) {
        let overlap = self.overlap();
        for detection in self.choose(more, config) {
            if found.iter().all(|known| overlap(known, &detection) <= config.max_overlap) {
                found.push(detection);
            }
        }
    }

    /// Searches the whole photo at a size, with a border that is a share of its longer side.
    fn at_scale(&self, photo: &RgbImage, scale: f64, border: f64, config: &DetectConfig) -> Result<Vec<Detection>> {
        let scaled = scaled(photo, scale);
        let border = (border * f64::from(scaled.width().max(scaled.height()))).round() as usize;
        let found = self.look(&scaled, border, config)?;
        Ok(found.into_iter().map(|detection| at_size(detection, &scaled, photo)).collect())
    }

    /// Searches a photo at a size in overlapping tiles.
    fn in_tiles(&self, photo: &RgbImage, scale: f64, config: &DetectConfig) -> Result<Vec<Detection>> {
        let scaled = scaled(photo, scale);
        let (width, height) = (scaled.width() as usize, scaled.height() as usize);
        let (columns, rows) = (starts(width), starts(height));
        if columns.len().saturating_mul(rows.len()) > MAX_TILES {
            return Err(Error::Detection(format!(
                "expected at most {MAX_TILES} tiles of {TILE} pixels, found {}x{} in a photo of {}x{}; look for larger \
                 faces",
                columns.len(),
                rows.len(),
                photo.width(),
                photo.height()
            )));
        }
        let mut all = Vec::new();
        for &top in &rows {
            for &left in &columns {
                let (w, h) = (TILE.min(width - left), TILE.min(height - top));
                let tile = imageops::crop_imm(&*scaled, left as u32, top as u32, w as u32, h as u32).to_image();
                // A tile inside the photo has edges that are none of the photo's.
                let is_whole = |detection: &Detection| {
                    let [x0, y0, x1, y1] = detection.bounds;
                    let is_inside = |edge: f32, is_photo: bool| is_photo || edge >= EDGE_PX;
                    is_inside(x0, left == 0)
                        && is_inside(y0, top == 0)
                        && is_inside(w as f32 - x1, left + w == width)
                        && is_inside(h as f32 - y1, top + h == height)
                };
                let found = self.look(&tile, 0, config)?.into_iter().filter(is_whole);
                all.extend(found.map(|detection| at_size(moved(detection, [left, top]), &scaled, photo)));
            }
        }
        Ok(all)
    }
}

/// Scales beyond the first that are needed to find faces of `min_face` pixels: each twice the one before, the last the
/// photo's own at most.
fn finer(first: f64, min_face: Option<f32>) -> Vec<f64> {
    let wanted = min_face.map_or(0.0, |side| f64::from(SMALLEST_PX / side)).min(1.0);
    let mut scales = Vec::new();
    let mut scale = first;
    while scale < wanted {
        scale = (2.0 * scale).min(wanted);
        scales.push(scale);
    }
    scales
}

/// Where tiles start along a side, so that neighbours share enough.
fn starts(side: usize) -> Vec<usize> {
    let num = side.saturating_sub(SHARED).div_ceil(TILE - SHARED).max(1);
    let last = side.saturating_sub(TILE);
    (0..num).map(|i| if num == 1 { 0 } else { i * last / (num - 1) }).collect()
}

/// Returns the photo at a scale, at least one pixel on each side.
fn scaled(photo: &RgbImage, scale: f64) -> Cow<'_, RgbImage> {
    let size = [photo.width(), photo.height()].map(|side| ((f64::from(side) * scale) as usize).max(1));
    match size == [photo.width() as usize, photo.height() as usize] || photo.is_empty() {
        true => Cow::Borrowed(photo),
        false => Cow::Owned(resize(photo, size)),
    }
}

/// A detection in `from` as one of `to`, the same photo at another size.
fn at_size(detection: Detection, from: &RgbImage, to: &RgbImage) -> Detection {
    let step = [to.width() as f32 / from.width() as f32, to.height() as f32 / from.height() as f32];
    let Detection { bounds: [x0, y0, x1, y1], landmarks, score } = detection;
    Detection {
        bounds: [x0 * step[0], y0 * step[1], x1 * step[0], y1 * step[1]],
        landmarks: landmarks.map(|points| points.map(|[x, y]| [x * step[0], y * step[1]])),
        score,
    }
}

fn moved(detection: Detection, [x, y]: [usize; 2]) -> Detection {
    let [x, y] = [x as f32, y as f32];
    let Detection { bounds: [x0, y0, x1, y1], landmarks, score } = detection;
    Detection {
        bounds: [x0 + x, y0 + y, x1 + x, y1 + y],
        landmarks: landmarks.map(|points| points.map(|[px, py]| [px + x, py + y])),
        score,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_a_side_and_neighbours_share_enough() {
        for side in [1, 100, 640, 641, 1120, 1121, 5000, 50_000] {
            let starts = starts(side);
            assert_eq!(starts[0], 0);
            assert_eq!(starts[starts.len() - 1] + TILE.min(side), side.max(TILE.min(side)), "{side}");
            for pair in starts.windows(2) {
                assert!(pair[1] > pair[0] && pair[0] + TILE >= pair[1] + SHARED, "{side}: {starts:?}");
            }
        }
        assert_eq!(starts(640), [0]);
        assert_eq!(starts(1120), [0, 480]);
    }

    #[test]
    fn finer_scales_double_up_to_what_the_smallest_face_needs() {
        assert!(finer(0.5, None).is_empty() && finer(0.5, Some(40.0)).is_empty());
        assert_eq!(finer(0.1, Some(32.0)), [0.2, 0.4, 0.5]);
        assert_eq!(finer(0.3, Some(1.0)), [0.6, 1.0]);
    }
}
