//! Aligned crops of images that are crops already or photos with faces.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use image::RgbImage;

use super::config::DetectConfig;
use super::detector::Detector;
use super::search::Face;
use crate::data::{ALIGNED_LANDMARKS, FACE_SIZE, Landmarks, align_face_to};
use crate::error::{Error, Result};

/// What images are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageKind {
    /// A square image of the side that crops have, or of [`FACE_SIZE`], is a crop; any other is a photo.
    #[default]
    BySize,
    /// Aligned crops, all of them.
    Crops,
    /// Photos, all of them.
    Photos,
}

/// The face of a photo that is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Which {
    /// The one with the largest box
    #[default]
    Largest,
    /// The one whose centre is nearest to the photo's
    Central,
    /// The one with the highest score
    Surest,
    /// The only one; several are an error
    Only,
}

impl Which {
    /// Returns the face that is meant; none if there is none. Several where only one may be are the caller's to refuse.
    pub fn choose(self, faces: Vec<Face>, photo: &RgbImage) -> Option<Face> {
        let area = |face: &Face| {
            let [x0, y0, x1, y1] = face.bounds;
            (x1 - x0) * (y1 - y0)
        };
        let (w, h) = (photo.width() as f32, photo.height() as f32);
        let distance = |face: &Face| {
            let [x0, y0, x1, y1] = face.bounds;
            ((x0 + x1 - w) / 2.0).hypot((y0 + y1 - h) / 2.0)
        };
        // Of equal ones the surest: they come in that order.
        let better = |a: &Face, b: &Face| match self {
            Which::Largest => area(a) > area(b),
            Which::Central => distance(a) < distance(b),
            Which::Surest | Which::Only => a.score > b.score,
        };
        faces.into_iter().reduce(|best, face| if better(&face, &best) { face } else { best })
    }
}

/// Settings of a [`Cropper`].
#[derive(Clone, Debug, PartialEq)]
pub struct CropConfig {
    /// What images are.
    pub kind: ImageKind,
    /// The face of a photo that is meant.
    pub which: Which,
    /// The search for faces.
    pub detect: DetectConfig,
    /// Side of the crops of photos, in pixels.
    pub side: u32,
}

impl Default for CropConfig {
    fn default() -> Self {
        let (kind, which) = (ImageKind::default(), Which::default());
        Self { kind, which, detect: DetectConfig::default(), side: FACE_SIZE }
    }
}

/// An aligned crop.
#[derive(Clone, Debug, PartialEq)]
pub struct Crop {
    /// The crop, square.
    pub image: RgbImage,
    /// Landmarks in pixels of the crop.
    pub landmarks: Landmarks,
    /// The face in the photo; none if the image was a crop.
    pub face: Option<Face>,
    /// Number of faces in the photo; 1 for a crop.
    pub num_faces: usize,
}

/// Number of images of each kind that were cropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CropCounts {
    /// Images that were crops.
    pub crops: usize,
    /// Photos with one face.
    pub photos: usize,
    /// Photos with several faces, of which one was taken.
    pub several: usize,
}

/// Returns an image that is a crop.
pub(super) fn as_it_is(image: RgbImage) -> Crop {
    let scale = image.width() as f32 / FACE_SIZE as f32;
    let landmarks = ALIGNED_LANDMARKS.map(|point| point.map(|v| scale * v));
    Crop { image, landmarks, face: None, num_faces: 1 }
}

/// Makes crops, with a detector that is opened for the first photo.
///
/// ```no_run
/// use std::path::Path;
///
/// use maskinv::data::read_image;
/// use maskinv::face::{CropConfig, Cropper, Detector};
///
/// # fn main() -> maskinv::Result<()> {
/// let open = || Detector::open(Path::new("face_detection_yunet_2023mar.onnx"));
/// let cropper = Cropper::new(CropConfig::default(), open);
/// let path = Path::new("photo.jpg");
/// let crop = cropper.crop(read_image(path)?, path)?;
/// println!("{}x{} pixels of one of {} faces", crop.image.width(), crop.image.height(), crop.num_faces);
/// # Ok(())
/// # }
/// ```
pub struct Cropper {
    config: CropConfig,
    open: Box<dyn Fn() -> Result<Detector> + Send + Sync>,
    detector: OnceLock<Detector>,
    /// Held while the detector is opened, so that it is opened once.
    opening: Mutex<()>,
    counts: [AtomicUsize; 3],
}

impl std::fmt::Debug for Cropper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cropper").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Cropper {
    /// Returns a cropper; `open` opens the detector once a photo needs it. It is called while other threads wait for
    /// it, so it must not start parallel work that waits for a crop.
    pub fn new(config: CropConfig, open: impl Fn() -> Result<Detector> + Send + Sync + 'static) -> Self {
        let (detector, opening) = (OnceLock::new(), Mutex::new(()));
        Self { config, open: Box::new(open), detector, opening, counts: Default::default() }
    }

    /// Returns the cropper with a detector that is open.
    pub fn with_detector(self, detector: Detector) -> Self {
        Self { detector: OnceLock::from(detector), ..self }
    }

    /// Settings.
    pub fn config(&self) -> &CropConfig {
        &self.config
    }

    /// The detector, once it is open.
    pub fn opened(&self) -> Option<&Detector> {
        self.detector.get()
    }

    /// Returns the number of images cropped so far.
    pub fn counts(&self) -> CropCounts {
        let [crops, photos, several] = [0, 1, 2].map(|i| self.counts[i].load(Ordering::Relaxed));
        CropCounts { crops, photos, several }
    }

    /// Whether an image is a crop. One that must be a crop and cannot be one is an error.
    ///
    /// # Errors
    /// When crops are expected, and the image is not of their size.
    pub fn is_crop(&self, image: &RgbImage, name: &Path) -> Result<bool> {
        let (width, height) = image.dimensions();
        let is_square = width == height && (width == self.config.side || width == FACE_SIZE);
        match self.config.kind {
            ImageKind::Photos => Ok(false),
            ImageKind::Crops if !is_square => Err(Error::Image {
                path: name.to_owned(),
                what: format!("expected {0}x{0} pixels, an aligned crop, found {width}x{height}", self.config.side),
            }),
            ImageKind::Crops | ImageKind::BySize => Ok(is_square),
        }
    }

    /// Returns all faces of a photo, the surest first; none is no error.
    ///
    /// # Errors
    /// [`Error::Detection`] when the detector cannot be opened; [`Error::Image`] when the photo is too large.
    pub fn faces(&self, photo: &RgbImage, name: &Path) -> Result<Vec<Face>> {
        let in_photo = |e: Error| match e {
            Error::Detection(what) => Error::Image { path: name.to_owned(), what },
            other => other,
        };
        let detector = self.detector(photo, name)?;
        detector.detect(photo, &self.config.detect).map_err(in_photo)
    }

    /// Returns the crop of an image: itself, or that of the face that is meant.
    ///
    /// # Errors
    /// [`Error::Face`] when a photo has no face, or several and only one may be there; as [`Self::is_crop`] and
    /// [`Self::faces`].
    pub fn crop(&self, image: RgbImage, name: &Path) -> Result<Crop> {
        let crop = match self.is_crop(&image, name)? {
            true => as_it_is(image),
            false => {
                let faces = self.faces(&image, name)?;
                let (num_faces, face) = (faces.len(), self.chosen(faces, &image, name)?);
                self.of_face(&image, &face, num_faces)?
            }
        };
        let kind = match (&crop.face, crop.num_faces) {
            (None, _) => 0,
            (Some(_), 1) => 1,
            (Some(_), _) => 2,
        };
        self.counts[kind].fetch_add(1, Ordering::Relaxed);
        Ok(crop)
    }

    /// Returns the crop of a face of a photo.
    ///
    /// # Errors
    /// When the landmarks are all in one place, or the detector gives none.
    pub fn of_face(&self, photo: &RgbImage, face: &Face, num_faces: usize) -> Result<Crop> {
        let (image, landmarks) = align_face_to(photo, face.points()?, self.config.side)?;
        Ok(Crop { image, landmarks, face: Some(face.clone()), num_faces })
    }

    /// Returns the face that is meant.
    ///
    /// # Errors
    /// [`Error::Face`] when there is none, or several and only one may be there.
    pub fn chosen(&self, faces: Vec<Face>, photo: &RgbImage, name: &Path) -> Result<Face> {
        let num = faces.len();
        if num > 1 && self.config.which == Which::Only {
            return Err(Error::Face { path: name.to_owned(), what: format!("expected one face, found {num}") });
        }
        self.config.which.choose(faces, photo).ok_or_else(|| self.no_face(name))
    }

    /// The error of a photo without a face.
    pub fn no_face(&self, name: &Path) -> Error {
        let what = format!("no face found at a score of {} or more", self.config.detect.min_score);
        Error::Face { path: name.to_owned(), what }
    }

    /// Returns the detector, which a photo needs.
    fn detector(&self, photo: &RgbImage, name: &Path) -> Result<&Detector> {
        if let Some(detector) = self.detector.get() {
            return Ok(detector);
        }
        let _guard = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if self.detector.get().is_none() {
            let (width, height, side) = (photo.width(), photo.height(), self.config.side);
            let detector = (self.open)().map_err(|e| {
                let why = if let Error::Detection(what) = e { what } else { e.to_string() };
                let name = name.display();
                Error::Detection(match self.config.kind {
                    ImageKind::Photos => format!("{name} is to be searched for faces: {why}"),
                    _ => format!("{name} is no aligned crop of {side}x{side} but {width}x{height} pixels: {why}"),
                })
            })?;
            let _ = self.detector.set(detector);
        }
        Ok(self.detector.get().expect("it was set, and is set once"))
    }
}
