//! Folders of identities: what is listed, in which order, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use maskinv::data::{ALIGNED_LANDMARKS, Dataset, FaceFolder, IdentityFilter, PairList, Sample, Subset, open_source};
use maskinv::{Error, Result};
use tempfile::TempDir;

/// A textured crop, so that a JPEG of it has many bytes to lose.
fn crop(width: u32, height: u32, seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 2) as u8, (y * 2) as u8, (x * y * 37 + seed * 50) as u8]))
}

fn temp() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn write(path: PathBuf, bytes: &[u8]) -> PathBuf {
    fs::create_dir_all(path.parent().expect("inside a folder")).expect("can create folders");
    fs::write(&path, bytes).expect("can write");
    path
}

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).expect("can encode");
    bytes.into_inner()
}

/// Three identities, `B` `a_1` `c`, with 1, 3 and 2 images.
fn example() -> TempDir {
    let dir = temp();
    for (i, name) in ["c/c_0002.JPG", "c/c_0010.jpg", "B/B_1.jpeg", "a_1/a_1_0003.jpg", "a_1/a_1_0001.jpg", "a_1/x.jpg"]
        .iter()
        .enumerate()
    {
        write(dir.path().join(name), &encode(crop(112, 112, i as u32), ImageFormat::Jpeg));
    }
    dir
}

fn open_error(path: &Path) -> String {
    FaceFolder::open(path).expect_err("must be refused").to_string()
}

/// Writes one file as the only image and returns what reading it says.
fn get_error(file_name: &str, bytes: &[u8]) -> String {
    let dir = temp();
    let path = write(dir.path().join("p").join(file_name), bytes);
    let error = FaceFolder::open(dir.path()).and_then(|f| f.get(0)).expect_err("must be refused");
    assert!(matches!(error, Error::Image { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with(&path.display().to_string()), "{text}");
    text
}

#[test]
fn folder_is_listed_in_byte_order() -> Result<()> {
    let dir = example();
    write(dir.path().join("README.md"), b"not an identity");
    write(dir.path().join(".DS_Store"), b"");
    write(dir.path().join("c/Thumbs.db"), b"");
    let folder = FaceFolder::open(dir.path())?;
    assert_eq!((folder.len(), folder.num_identities(), folder.num_skipped_identities()), (6, 3, 0));
    assert_eq!([0, 1, 2].map(|l| folder.identity_name(l)), ["B", "a_1", "c"]);
    let paths: Vec<PathBuf> = (0..6).filter_map(|i| folder.path(i)).collect();
    let names = ["B/B_1.jpeg", "a_1/a_1_0001.jpg", "a_1/a_1_0003.jpg", "a_1/x.jpg", "c/c_0002.JPG", "c/c_0010.jpg"];
    assert_eq!(paths, names.map(|n| dir.path().join(n)));
    assert_eq!((0..6).map(|i| folder.label(i)).collect::<Vec<_>>(), [0, 1, 1, 1, 2, 2]);
    assert_eq!(folder.name(4), paths[4].display().to_string());
    let sample = folder.get(3)?;
    assert_eq!((sample.label, sample.landmarks, sample.image.dimensions()), (1, ALIGNED_LANDMARKS, (112, 112)));
    assert_eq!(folder.get(3)?, sample);
    Ok(())
}

#[test]
fn images_are_found_by_identity_and_number() -> Result<()> {
    let dir = example();
    let folder = FaceFolder::open(dir.path())?;
    let resolved = |line: &str| {
        let list = write(dir.path().join("pairs.txt"), line.as_bytes());
        PairList::read(list)?.resolve(&folder).map(|pairs| (pairs[0].a, pairs[0].b))
    };
    assert_eq!(resolved("B 1 a_1 1")?, (0, 1));
    assert_eq!(resolved("a_1 3 c 2")?, (2, 4));
    assert_eq!(resolved("c 10 2")?, (5, 4));
    for missing in ["B 2 a_1 1", "a 1 c 2", "a_1 1 2", "C 2 c 2"] {
        assert!(resolved(missing).is_err(), "{missing}");
    }
    Ok(())
}

#[test]
fn filters_leave_labels_contiguous() -> Result<()> {
    let dir = example();
    let folder = Arc::new(FaceFolder::open(dir.path())?);
    let filtered = |min_images, names: Option<&[&str]>| {
        let names = names.map(|names| names.iter().map(|n| n.to_string()).collect());
        Subset::new(folder.clone(), &IdentityFilter { min_images, names }, dir.path())
    };
    let two = filtered(2, None)?;
    assert_eq!((two.len(), two.num_identities(), two.num_skipped_identities()), (5, 2, 1));
    assert_eq!((two.identity_name(0).as_str(), two.label(0), two.label(4)), ("a_1", 0, 1));
    assert_eq!(two.get(4)?, Sample { label: 1, ..folder.get(5)? });
    assert_eq!((two.name(4), two.file_name(4)), (folder.name(5), folder.file_name(5)));

    let listed = filtered(0, Some(&["c", "a_1", "c"]))?;
    assert_eq!((listed.len(), listed.num_identities(), listed.num_skipped_identities()), (5, 2, 0));
    let text = filtered(0, Some(&["c", "Nobody"])).map(|_| ()).expect_err("must be refused").to_string();
    assert!(text.ends_with("expected images of identity Nobody, found none"), "{text}");
    let none = filtered(9, Some(&["c"])).map(|_| ()).expect_err("must be refused").to_string();
    assert!(none.contains("leaves none of 3 identities"), "{none}");
    Ok(())
}

#[test]
fn all_formats_become_rgb() -> Result<()> {
    let dir = temp();
    let image = crop(112, 112, 1);
    let grey = GrayImage::from_fn(112, 112, |x, y| Luma([(x + y) as u8]));
    for (name, format) in [
        ("p/a.png", ImageFormat::Png),
        ("p/b.bmp", ImageFormat::Bmp),
        ("p/c.webp", ImageFormat::WebP),
        ("p/d.PPM", ImageFormat::Pnm),
        ("p/e.jpg", ImageFormat::Png), // the content decides
    ] {
        write(dir.path().join(name), &encode(image.clone(), format));
    }
    write(dir.path().join("q/a.pgm"), &encode(grey.clone(), ImageFormat::Pnm));
    let folder = FaceFolder::open(dir.path())?;
    for i in 0..5 {
        assert_eq!(folder.get(i)?.image, image, "{}", folder.name(i));
    }
    let found = folder.get(5)?.image;
    assert!(found.enumerate_pixels().all(|(x, y, p)| p.0 == [(x + y) as u8; 3]));
    Ok(())
}

#[test]
fn what_is_no_image_is_named() {
    for (file, found) in [
        ("c/more/x.jpg", "expected images, found folder more: "),
        ("stray.jpg", "expected a folder per identity, found image stray.jpg: "),
    ] {
        let dir = example();
        write(dir.path().join(file), b"");
        let text = open_error(dir.path());
        assert!(text.contains(found), "{text}");
        assert!(text.starts_with(&dir.path().display().to_string()), "{text}");
    }
}

#[test]
fn folders_without_faces_are_refused() {
    let dir = temp();
    assert!(open_error(dir.path()).ends_with("expected a folder per identity, found none"));
    let missing = dir.path().join("missing");
    assert!(matches!(FaceFolder::open(&missing), Err(Error::Io { path, .. }) if path == missing));
    fs::create_dir(dir.path().join("Empty")).expect("can create");
    let text = open_error(dir.path());
    assert!(text.ends_with("expected a folder per identity, found folders without images"), "{text}");
}

#[test]
fn images_of_another_size_are_refused_with_advice() {
    let text = get_error("x.pgm", &encode(GrayImage::new(92, 112), ImageFormat::Pnm));
    assert!(text.contains("expected 112x112 pixels, found 92x112") && text.contains("aligned"), "{text}");
}

#[test]
fn images_cut_off_anywhere_are_refused() {
    let image = crop(112, 112, 3);
    for (name, format) in [("x.jpg", ImageFormat::Jpeg), ("x.png", ImageFormat::Png), ("x.bmp", ImageFormat::Bmp)] {
        let bytes = encode(image.clone(), format);
        for keep in [1, 20, bytes.len() / 2, bytes.len() - 2] {
            // A PNG ends in an empty chunk that says so; without it the pixels are all there.
            let keep = if format == ImageFormat::Png { keep.min(bytes.len() - 30) } else { keep };
            get_error(name, &bytes[..keep]);
        }
    }
    get_error("empty.jpg", b"");
    get_error("text.jpg", b"<html>not found</html>");
}

#[test]
fn end_marker_of_a_thumbnail_does_not_complete_a_jpeg() -> Result<()> {
    let bytes = encode(crop(112, 112, 4), ImageFormat::Jpeg);
    // A comment segment that holds an end-of-image marker, right after the start-of-image marker.
    let with_comment = [&bytes[..2], &[0xff, 0xfe, 0, 6, 0xff, 0xd9, 0xff, 0xd9], &bytes[2..]].concat();
    let dir = temp();
    write(dir.path().join("p/x.jpg"), &with_comment);
    assert_eq!(FaceFolder::open(dir.path())?.get(0)?.image.dimensions(), (112, 112));
    let text = get_error("x.jpg", &with_comment[..with_comment.len() / 2]);
    assert!(text.contains("truncated"), "{text}");
    Ok(())
}

#[test]
fn forged_sizes_do_not_allocate() {
    let mut bmp = encode(crop(112, 112, 5), ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0xf0, 0xff, 0, 0, 0xf0, 0xff, 0, 0]); // 65520x65520
    get_error("x.bmp", &bmp);
    assert!(get_error("x.ppm", b"P6 400000 400000 255\n").contains("found 400000x400000"));
    let mut jpeg = encode(crop(112, 112, 6), ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).expect("a frame header");
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    assert!(get_error("x.jpg", &jpeg).contains("found 65535x65535"));
}

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_lfw_folder_opens() -> Result<()> {
    let data = crate::fixture::data();
    let folder = FaceFolder::open(data.join("lfw112/images"))?;
    assert_eq!((folder.len(), folder.num_identities()), (9021, 3959));
    for i in (0..folder.len()).step_by(451) {
        folder.get(i)?;
    }
    Ok(())
}

#[test]
fn folders_as_people_have_them() -> Result<()> {
    let dir = example();
    let root = dir.path();
    for junk in
        ["a_1/._a_1_0001.jpg", "c/Thumbs.db", ".ipynb_checkpoints/x.jpg", "__MACOSX/a_1/._a.jpg", "c/@eaDir/c.jpg"]
    {
        write(root.join(junk), b"");
    }
    std::fs::create_dir(root.join("lost+found")).unwrap();
    let before = FaceFolder::open(root)?;
    assert_eq!((before.len(), before.num_identities(), before.notes().len()), (6, 3, 0));
    // What somebody put there is left out and counted.
    write(root.join("c/notes.txt"), b"who is this?");
    write(root.join("c/c_0003.gif"), b"");
    std::fs::create_dir(root.join("nobody")).unwrap();
    write(root.join("B/B_2.jfif"), b"");
    let folder = FaceFolder::open(root)?;
    assert_eq!((folder.len(), folder.num_identities()), (7, 3));
    let notes = folder.notes().join("; ");
    assert!(
        notes.starts_with("2 files that are no images are left out, such as ") && notes.contains("c_0003.gif"),
        "{notes}"
    );
    assert!(notes.ends_with("1 people without images are left out, such as nobody"), "{notes}");
    // An archive beside the people, a folder around them, or `images` without lists.
    write(root.join("faces.tar"), b"");
    assert_eq!(open_source(root)?.images.len(), 7);
    let outer = temp();
    for around in ["lfw/lfw", "images"] {
        let inner = outer.path().join(around.replace('/', "-")).join(around);
        std::fs::create_dir_all(inner.parent().unwrap()).unwrap();
        copy(root, &inner);
        let source = open_source(&outer.path().join(around.replace('/', "-")))?;
        assert_eq!((source.images.len(), source.images.num_identities()), (7, 3), "{around}");
    }
    let splits = temp();
    ["train", "val"].into_iter().for_each(|split| copy(root, &splits.path().join(split)));
    let error = open_source(splits.path()).map(|_| ()).expect_err("two splits").to_string();
    assert!(error.contains("found folders of folders: give one of train, val"), "{error}");
    // People whose names are numbers are in the order that other formats have.
    let numbers = temp();
    for name in ["10", "9", "1", "2"] {
        write(numbers.path().join(name).join("x.jpg"), b"");
    }
    assert_eq!(FaceFolder::open(numbers.path())?.identity_names(), ["1", "2", "9", "10"]);
    Ok(())
}

/// Copies people and their images.
fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let target = to.join(entry.file_name().unwrap());
        match entry.is_dir() {
            true => {
                std::fs::create_dir_all(&target).unwrap();
                copy(&entry, &target);
            }
            false if entry.extension().is_some_and(|x| x != "tar") => drop(std::fs::copy(&entry, &target).unwrap()),
            false => {}
        }
    }
}
