use std::fs;
use std::path::Path;

use super::column::Column;
use super::*;
use crate::models::ComputedWith;
use crate::ops::search::dot;
use crate::preprocessing::Preprocessing;

const DIM: usize = 24;

fn model(weights: &str) -> GalleryModel {
    let (preprocessing, precision) = (Preprocessing::default(), "f32".to_owned());
    let computed_with = ComputedWith { preprocessing, weights: weights.to_owned(), precision };
    GalleryModel { name: "net.safetensors".to_owned(), embedding_size: DIM, computed_with }
}

/// An embedding of length 1.
fn embedding(k: usize) -> Vec<f32> {
    let value = |i: usize| (((k * DIM + i) as f64 * 12.989_8).sin() * 43_758.545_3).fract();
    let values: Vec<f64> = (0..DIM).map(value).collect();
    let length = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    values.into_iter().map(|v| (v / length) as f32).collect()
}

/// Face `k` of a person with three faces.
fn face(k: usize) -> NewFace {
    let mut image = [0; 32];
    image[..8].copy_from_slice(&(k as u64).to_le_bytes());
    NewFace {
        person: format!("person {}", k / 3),
        embedding: embedding(k),
        image,
        source: format!("photos/{k}.jpg"),
        enrolled: 1_000_000 + k as i64,
        score: k.is_multiple_of(2).then_some(0.9),
        side: k.is_multiple_of(2).then_some(80.0),
        sharpness: 100.0 + k as f32,
        mask: Some(if k % 3 == 2 { 0.9 } else { 0.1 }),
    }
}

fn faces(range: std::ops::Range<usize>) -> Vec<NewFace> {
    range.map(face).collect()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Whether any file of the folder has these bytes.
fn has_bytes(folder: &Path, bytes: &[u8]) -> bool {
    let files = fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
    files.into_iter().any(|file| file.windows(bytes.len()).any(|found| found == bytes))
}

fn bytes(embedding: &[f32]) -> Vec<u8> {
    embedding.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn what_is_enrolled_is_there_and_what_is_removed_is_gone() {
    let folder = folder();
    let path = folder.path().join("people.gallery");
    let mut gallery = Gallery::open_or_create(&path, &model("a")).unwrap();
    let added = gallery.enrol(&faces(0..30)).unwrap();
    assert_eq!(added[29], Added::New(30));
    // A photo that the person has is passed over; the same photo of somebody else is not.
    let other = NewFace { person: "Zoë".to_owned(), ..face(4) };
    assert_eq!(gallery.enrol(&[face(4), other]).unwrap(), [Added::Known(5), Added::New(31)]);
    assert!(gallery.has("Zoë", &face(4).image).unwrap() && !gallery.has("Zoë", &face(5).image).unwrap());
    drop(gallery);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    let mut gallery = Gallery::open(&path).unwrap();
    let info = gallery.info().unwrap();
    assert_eq!((info.num_people, info.num_faces, info.num_masked), (11, 31, Some(10)));
    assert_eq!(
        gallery.people().unwrap()[0],
        Person { name: "Zoë".to_owned(), num_faces: 1, first_enrolled: 1_000_004, last_enrolled: 1_000_004 }
    );
    let of_person = gallery.faces(Some("person 3")).unwrap();
    assert_eq!(
        of_person.iter().map(|face| face.source.as_str()).collect::<Vec<_>>(),
        ["photos/9.jpg", "photos/10.jpg", "photos/11.jpg"]
    );
    assert!(gallery.check().unwrap().is_empty());
    // The columns of searches have the embeddings too, and so has one that a killed process was writing.
    for kind in ColumnKind::ALL {
        for pool in [Pool::Best, Pool::Mean] {
            Finder::new(&gallery, kind, pool).unwrap();
        }
    }
    let killed = super::column::temporary(gallery.path()).unwrap().into_temp_path().keep().unwrap();
    fs::write(&killed, bytes(&embedding(10))).unwrap();
    let (gone, stays) = (bytes(&embedding(10)), bytes(&embedding(12)));
    assert!(has_bytes(folder.path(), &gone) && has_bytes(folder.path(), &stays));
    let unknown = gallery.remove_people(&["person 3".to_owned(), "nobody".to_owned()]).unwrap_err();
    assert!(unknown.to_string().ends_with("expected a person nobody, found none"), "{unknown}");
    assert_eq!(gallery.faces(Some("person 3")).unwrap().len(), 3);
    let removed = gallery.remove_people(&["person 3".to_owned()]).unwrap();
    assert_eq!(removed, Removed { num_faces: 3, is_log_empty: true });
    assert!(!has_bytes(folder.path(), &gone) && has_bytes(folder.path(), &stays));
    assert!(gallery.faces(Some("person 3")).is_err());
    // The last face of a person takes the person with it, and numbers are not used again.
    assert_eq!(gallery.remove_faces(&[31]).unwrap().num_faces, 1);
    assert_eq!(gallery.info().unwrap().num_people, 9);
    assert_eq!(gallery.enrol(&[face(90)]).unwrap(), [Added::New(32)]);
    gallery.remove_people(&(0..8).filter(|k| *k != 3).map(|k| format!("person {k}")).collect::<Vec<_>>()).unwrap();
    gallery.compact().unwrap();
    assert!(gallery.check().unwrap().is_empty());
    assert_eq!(gallery.info().unwrap().free_bytes, 0);
}

#[test]
fn unusable_faces_are_refused_and_nothing_of_their_batch_is_written() {
    let folder = folder();
    let mut gallery = Gallery::open_or_create(&folder.path().join("g"), &model("a")).unwrap();
    let mut error = |change: &dyn Fn(&mut NewFace)| {
        let mut batch = faces(0..3);
        change(&mut batch[2]);
        gallery.enrol(&batch).unwrap_err().to_string()
    };
    assert!(error(&|face| face.embedding.truncate(5)).contains("expected an embedding of 24 elements"));
    assert!(error(&|face| face.embedding[0] = f32::NAN).contains("of length NaN"));
    assert!(error(&|face| face.embedding[0] += 1.0).contains("length 1, found 24"));
    assert!(error(&|face| face.person = " ".to_owned()).contains("expected a name"));
    assert!(error(&|face| face.person = "two\nlines".to_owned()).contains("two\\nlines"));
    assert!(error(&|face| face.person = "x".repeat(1001)).contains("up to 1000 bytes"));
    assert_eq!(gallery.info().unwrap().num_faces, 0);
}

#[test]
fn searches_find_the_people_of_the_highest_scores() {
    let folder = folder();
    let mut gallery = Gallery::open_or_create(&folder.path().join("g"), &model("a")).unwrap();
    assert!(
        Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap().search(&embedding(1), 3).unwrap()[0].is_empty()
    );
    gallery.enrol(&faces(0..150)).unwrap();
    let query: Vec<f32> = embedding(1000);
    let best = |person: usize| (0..3).map(|k| dot(&query, &embedding(3 * person + k))).fold(f64::MIN, f64::max);
    let mean = |person: usize| {
        let sum: Vec<f32> = (0..DIM).map(|i| (0..3).map(|k| embedding(3 * person + k)[i]).sum()).collect();
        dot(&query, &sum) / dot(&sum, &sum).sqrt()
    };
    let ranked = |score: &dyn Fn(usize) -> f64| {
        let mut all: Vec<(String, f64)> = (0..50).map(|p| (format!("person {p}"), score(p))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all
    };
    for kind in ColumnKind::ALL {
        for (pool, expected) in [(Pool::Best, ranked(&best)), (Pool::Mean, ranked(&mean))] {
            let finder = Finder::new(&gallery, kind, pool).unwrap();
            // Two queries, and more people than there are.
            for top in [1, 5, 80] {
                let found = finder.search(&[query.clone(), embedding(7)].concat(), top).unwrap();
                assert_eq!(found[0].len(), top.min(50));
                for (candidate, (person, score)) in found[0].iter().zip(&expected) {
                    assert_eq!(&candidate.person, person, "{kind:?} {pool:?}");
                    assert!((candidate.score - score).abs() < 1e-6);
                }
                if pool == Pool::Best {
                    let nearest = &found[1][0];
                    assert_eq!((nearest.person.as_str(), nearest.face.id), ("person 2", 8));
                    assert!(nearest.score > 0.999_999);
                }
            }
        }
    }
    // A change makes the column anew.
    gallery.remove_people(&[ranked(&best)[0].0.clone()]).unwrap();
    let found = Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap().search(&query, 1).unwrap();
    assert_eq!(found[0][0].person, ranked(&best)[1].0);
    gallery.enrol(&[NewFace { person: "new".to_owned(), embedding: query.clone(), ..face(500) }]).unwrap();
    let found = Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap().search(&query, 1).unwrap();
    assert_eq!(found[0][0].person, "new");
    assert!(Finder::new(&gallery, ColumnKind::F32, Pool::Best).unwrap().search(&query[1..], 1).is_err());
}

/// Many faces of the nearest person are one candidate.
#[test]
fn a_person_with_many_faces_does_not_hide_others() {
    let folder = folder();
    let mut gallery = Gallery::open_or_create(&folder.path().join("g"), &model("a")).unwrap();
    let near = |k: usize| {
        let mut values: Vec<f64> = embedding(0).iter().map(|v| f64::from(*v)).collect();
        values[k % DIM] += 1e-3 * (k + 1) as f64 / 300.0;
        let length = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        values.into_iter().map(|v| (v / length) as f32).collect()
    };
    let of_one = |k: usize| NewFace { person: "many".to_owned(), embedding: near(k), ..face(k) };
    gallery.enrol(&(0..300).map(of_one).collect::<Vec<_>>()).unwrap();
    gallery.enrol(&faces(900..906)).unwrap();
    let found = Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap().search(&embedding(0), 3).unwrap();
    assert_eq!(found[0].iter().filter(|candidate| candidate.person == "many").count(), 1);
    assert_eq!(found[0].len(), 3);
}

#[test]
fn files_that_are_no_gallery_or_another_one_are_refused() {
    let folder = folder();
    let path = folder.path().join("g");
    let error = |path: &Path| Gallery::open(path).unwrap_err().to_string();
    assert!(error(&path).contains("expected a gallery, found no such file"));
    assert!(error(folder.path()).contains("found a folder"));
    fs::write(&path, b"short").unwrap();
    assert!(error(&path).contains("found another file"));
    assert!(Gallery::open_or_create(&path, &model("a")).unwrap_err().to_string().contains("another file"));
    assert_eq!(fs::read(&path).unwrap(), b"short");
    fs::write(&path, [7; 9000]).unwrap();
    assert!(error(&path).contains("found another file"));
    fs::remove_file(&path).unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("CREATE TABLE x (y)").unwrap();
    drop(other);
    assert!(error(&path).contains("another SQLite database"));
    fs::remove_file(&path).unwrap();
    assert!(Gallery::open_or_create(&folder.path().join("none/g"), &model("a")).is_err());

    let mut gallery = Gallery::open_or_create(&path, &model("a")).unwrap();
    gallery.enrol(&faces(0..3)).unwrap();
    let refused = Gallery::open_or_create(&path, &model("b")).unwrap_err().to_string();
    assert!(refused.contains("weights a), found those of net.safetensors (24 elements, weights b)"), "{refused}");
    let mut bgr = model("a");
    bgr.computed_with.preprocessing.mean = 1.0;
    assert!(gallery.check_model(&bgr).unwrap_err().to_string().contains("expected preprocessing"));
    // Another precision is comparable.
    let mut half = model("a");
    half.computed_with.precision = "f16".to_owned();
    gallery.check_model(&half).unwrap();
    gallery.db.execute_batch("PRAGMA user_version = 2").unwrap();
    drop(gallery);
    assert!(error(&path).contains("expected a gallery of version 1, found version 2: a newer maskinv made it"));
}

#[test]
fn a_flipped_byte_is_found() {
    let folder = folder();
    let path = folder.path().join("g");
    let mut gallery = Gallery::open_or_create(&path, &model("a")).unwrap();
    gallery.enrol(&faces(0..60)).unwrap();
    assert!(gallery.empty_log().unwrap());
    drop(gallery);
    let whole = fs::read(&path).unwrap();
    let wanted = bytes(&embedding(40));
    let at = whole.windows(wanted.len()).position(|found| found == wanted).unwrap();
    let mut broken = whole.clone();
    broken[at + 17] ^= 4;
    fs::write(&path, &broken).unwrap();
    let gallery = Gallery::open(&path).unwrap();
    let found = gallery.check().unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("face 41") && found[0].contains("photos/40.jpg"), "{found:?}");
    let error = Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap_err().to_string();
    assert!(error.contains("face 41"), "{error}");
    drop(gallery);
    // Any other byte either changes nothing that is read, or is found, and never panics.
    let mut num_found = 0;
    for at in (100..whole.len()).step_by(211) {
        let mut broken = whole.clone();
        broken[at] ^= 0x55;
        fs::write(&path, &broken).unwrap();
        let is_found = match Gallery::open(&path) {
            Ok(gallery) => gallery.check().map_or(true, |wrong| !wrong.is_empty()),
            Err(_) => true,
        };
        num_found += usize::from(is_found);
    }
    assert!(num_found > 10, "{num_found}");
}

#[test]
fn a_full_disk_loses_nothing() {
    let folder = folder();
    let mut gallery = Gallery::open_or_create(&folder.path().join("g"), &model("a")).unwrap();
    gallery.enrol(&faces(0..30)).unwrap();
    let pages: i64 = gallery.db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    gallery.db.query_row(&format!("PRAGMA max_page_count = {}", pages + 2), [], |_| Ok(())).unwrap();
    let error = gallery.enrol(&faces(30..3000)).unwrap_err().to_string();
    assert!(error.contains("full") && error.contains("what was enrolled before stays"), "{error}");
    assert_eq!(gallery.info().unwrap().num_faces, 30);
    assert!(gallery.check().unwrap().is_empty());
    gallery.db.query_row("PRAGMA max_page_count = 1000000", [], |_| Ok(())).unwrap();
    gallery.enrol(&faces(30..300)).unwrap();
    assert_eq!(gallery.info().unwrap().num_faces, 300);
}

/// A copy of an older file is put back: what was made of the newer one is not used.
#[test]
fn a_column_is_not_used_for_another_state() {
    let folder = folder();
    let path = folder.path().join("g");
    let mut gallery = Gallery::open_or_create(&path, &model("a")).unwrap();
    gallery.enrol(&faces(0..3)).unwrap();
    assert!(gallery.empty_log().unwrap());
    let backup = fs::read(&path).unwrap();
    gallery.enrol(&faces(30..33)).unwrap();
    let find = |gallery: &Gallery, k: usize| {
        let found = Finder::new(gallery, ColumnKind::Int8, Pool::Best).unwrap().search(&embedding(k), 1).unwrap();
        found[0][0].person.clone()
    };
    assert_eq!(find(&gallery, 31), "person 10");
    drop(gallery);
    fs::write(&path, backup).unwrap();
    let mut gallery = Gallery::open(&path).unwrap();
    gallery.enrol(&faces(60..63)).unwrap();
    assert_eq!(find(&gallery, 61), "person 20");
    // A column that was made before a removal is not put in place after it.
    let state = gallery.state().unwrap();
    assert!(gallery.if_still(state, || Ok(())).unwrap());
    gallery.remove_faces(&[1]).unwrap();
    assert!(!gallery.if_still(state, || panic!("it is not")).unwrap());
    // Enrolling what is there changes nothing.
    let state = gallery.state().unwrap();
    gallery.enrol(&faces(60..63)).unwrap();
    assert_eq!(gallery.state().unwrap(), state);
    // A damaged column is found.
    find(&gallery, 61);
    let column = Column::path_beside(gallery.path(), ColumnKind::Int8, false);
    let mut bytes = fs::read(&column).unwrap();
    let at = bytes.len() - 1;
    bytes[at] ^= 1;
    fs::write(&column, bytes).unwrap();
    assert!(gallery.check().unwrap()[0].contains("not as it was written"));
}

/// A face that passes its own threshold comes before one with a higher score that does not.
#[test]
fn people_are_ranked_by_the_thresholds_for_their_faces() {
    let folder = folder();
    let mut gallery = Gallery::open_or_create(&folder.path().join("g"), &model("a")).unwrap();
    gallery.enrol(&faces(0..60)).unwrap();
    let finder = Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap();
    let threshold = |_: usize, mask: Option<f32>| if mask.unwrap() >= 0.5 { 2.0 } else { 0.0 };
    let found = finder.search_above(&embedding(1000), 20, &threshold).unwrap();
    assert_eq!(found[0].len(), 20);
    assert!(found[0].iter().all(|candidate| candidate.face.mask.unwrap() < 0.5), "each has a face without a mask");
    assert!(finder.search(&[f32::NAN; DIM], 1).is_err());
    assert_eq!(finder.search(&embedding(1000), usize::MAX).unwrap()[0].len(), 20);
}

#[test]
fn several_writers_and_readers_at_once() {
    let folder = folder();
    let path = folder.path().join("g");
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = &path;
            scope.spawn(move || {
                let mut gallery = Gallery::open_or_create(path, &model("a")).unwrap();
                for k in 0..20 {
                    gallery.enrol(&faces(1000 * writer + 3 * k..1000 * writer + 3 * k + 3)).unwrap();
                    let finder = Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap();
                    assert!(!finder.search(&embedding(1000 * writer), 2).unwrap()[0].is_empty());
                }
            });
        }
    });
    let gallery = Gallery::open(&path).unwrap();
    assert_eq!((gallery.info().unwrap().num_faces, gallery.check().unwrap().len()), (240, 0));
    assert_eq!(Finder::new(&gallery, ColumnKind::Int8, Pool::Best).unwrap().num_rows(), 240);
}

#[test]
fn people_are_named_by_their_folder_or_file() {
    let name = |photo: &str, root: &str| person_of(Path::new(photo), Path::new(root)).unwrap();
    assert_eq!(name("photos/Ada/1.jpg", "photos"), "Ada");
    assert_eq!(name("photos/2020/Ada/1.jpg", "photos"), "Ada");
    assert_eq!(name("photos/ada.jpg", "photos"), "ada");
    assert_eq!(name("ada.jpg", "ada.jpg"), "ada");
    assert_eq!(name("other/ada.jpg", "other/ada.jpg"), "ada");
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_has_all_columns() {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    use ::parquet::record::{ListAccessor, RowAccessor};

    let folder = folder();
    let mut gallery = Gallery::open_or_create(&folder.path().join("g"), &model("a")).unwrap();
    gallery.enrol(&faces(0..9)).unwrap();
    let path = folder.path().join("out.parquet");
    assert_eq!(export_parquet(&gallery, &path).unwrap(), 9);
    let reader = SerializedFileReader::new(fs::File::open(&path).unwrap()).unwrap();
    let rows: Vec<String> = reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string()).collect();
    assert_eq!(rows.len(), 9);
    assert!(rows[4].contains("person: \"person 1\"") && rows[4].contains("mask: 0.1"), "{}", rows[4]);
    assert!(rows[3].contains("score: null") && rows[4].contains("score: 0.9"), "{}", rows[3]);
    let row = reader.get_row_iter(None).unwrap().nth(4).unwrap().unwrap();
    let list = row.get_list(8).unwrap();
    let found: Vec<f32> = (0..list.len()).map(|i| list.get_float(i).unwrap()).collect();
    assert_eq!(found, embedding(4));
}
