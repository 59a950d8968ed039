//! The pairs that a model gets most wrong, as images in the page.

use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;

use super::document;
use crate::error::{Error, Result};
use crate::eval::Comparisons;

/// JPEG quality of the images, up to 100.
const JPEG_QUALITY: u8 = 85;

/// Two face images and a model's score of them.
#[derive(Debug)]
pub struct FacePair {
    /// The model's score.
    pub score: f64,
    /// Names of the images.
    pub names: [String; 2],
    /// The images as the model saw them, as `data:` URLs.
    pub(super) images: [String; 2],
}

/// The pairs that a model gets most wrong.
#[derive(Debug)]
pub struct Hardest {
    /// Pairs of one person with the lowest scores, the lowest first.
    pub genuine: Vec<FacePair>,
    /// Pairs of two people with the highest scores, the highest first.
    pub impostor: Vec<FacePair>,
}

impl Hardest {
    /// Finds the `num` hardest pairs of each kind; `face(k, side)` returns an image of pair `k` and its name.
    ///
    /// # Errors
    /// When an image cannot be read or encoded.
    pub fn find(
        comparisons: &Comparisons,
        num: usize,
        face: impl Fn(usize, usize) -> Result<(RgbImage, String)>,
    ) -> Result<Self> {
        let of_kind = |is_same: bool| {
            let mut order: Vec<usize> =
                (0..comparisons.len()).filter(|&k| comparisons.is_same()[k] == is_same).collect();
            let wrongness = |k: &usize| if is_same { comparisons.scores()[*k] } else { -comparisons.scores()[*k] };
            let num = num.min(order.len());
            if num > 0 && num < order.len() {
                order.select_nth_unstable_by(num - 1, |a, b| wrongness(a).total_cmp(&wrongness(b)));
            }
            order.truncate(num);
            order.sort_by(|a, b| wrongness(a).total_cmp(&wrongness(b)));
            let pair = |k: usize| {
                let [(a, name_a), (b, name_b)] = [face(k, 0)?, face(k, 1)?];
                Ok(FacePair {
                    score: comparisons.scores()[k],
                    names: [name_a, name_b],
                    images: [address(&a)?, address(&b)?],
                })
            };
            order.into_iter().map(pair).collect::<Result<Vec<_>>>()
        };
        Ok(Self { genuine: of_kind(true)?, impostor: of_kind(false)? })
    }
}

/// Encodes an image as a `data:` URL.
fn address(image: &RgbImage) -> Result<String> {
    let mut bytes = Vec::new();
    let written = JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(image);
    written.map_err(|e| Error::Evaluation(format!("cannot encode a face of the report: {e}")))?;
    Ok(document::address("image/jpeg", &bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hardest_pairs_are_the_lowest_genuine_and_the_highest_impostor_ones() {
        let scores = vec![0.9, 0.1, 0.5, 0.2, 0.8, 0.3];
        let is_same = vec![true, true, true, false, false, false];
        let comparisons = Comparisons::new(scores, is_same, None).unwrap();
        let face = |k: usize, side: usize| Ok((RgbImage::new(8, 8), format!("{k} {side}")));
        let hardest = Hardest::find(&comparisons, 2, face).unwrap();
        let found = |pairs: &[FacePair]| pairs.iter().map(|p| (p.names[1].clone(), p.score)).collect::<Vec<_>>();
        assert_eq!(found(&hardest.genuine), [("1 1".to_owned(), 0.1), ("2 1".to_owned(), 0.5)]);
        assert_eq!(found(&hardest.impostor), [("4 1".to_owned(), 0.8), ("5 1".to_owned(), 0.3)]);
        assert_eq!(Hardest::find(&comparisons, 9, face).unwrap().genuine.len(), 3);
        assert!(Hardest::find(&comparisons, 0, face).unwrap().impostor.is_empty());
        assert!(hardest.genuine[0].images[0].starts_with("data:image/jpeg;base64,/9j/"));
    }
}
