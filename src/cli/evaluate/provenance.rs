//! Checksum of a test set.

use anyhow::Result;
use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::files::hex;
use crate::parallel;

/// Returns a SHA-256 over the SHA-256 of each image's pixels, followed by `what`, such as a list of pairs. It does not
/// depend on the format in which a data set is stored.
pub(super) fn sha256_of_images(
    num: usize,
    image: impl Fn(usize) -> crate::Result<RgbImage> + Sync,
    what: &str,
) -> Result<String> {
    let of_image = |i| image(i).map(|image| Sha256::digest(image.as_raw()));
    let mut hasher = Sha256::new();
    for digest in parallel::try_map(num, of_image)? {
        hasher.update(digest);
    }
    hasher.update(what);
    Ok(hex(&hasher.finalize()))
}
