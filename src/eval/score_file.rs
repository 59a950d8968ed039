//! Score files: written for our own comparisons, and read from any system to measure it the same way.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::comparisons::Comparisons;
use crate::error::{Error, Result};
use crate::files;
use crate::lists::{MAYBE_SAME_COLUMNS, SAME_COLUMNS, Table, quoted, truth};
use crate::npy;

/// Names of the column of scores.
const SCORE: [&str; 4] = ["score", "similarity", "cosine", "cos"];

/// Contents of a score file.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreFile {
    /// Scores in file order, with identities if the file names them.
    pub comparisons: Comparisons,
    /// Groups of the two people of each pair, if the file names them.
    pub groups: Option<Vec<[String; 2]>>,
    /// Images of each pair, if the file names them.
    pub images: Option<ImagePairs>,
    /// Line numbers of pairs of an image with itself, if the file names images.
    pub with_itself: Vec<usize>,
    /// Line numbers of pairs that an earlier line has already, in either order; empty if the file does not name images.
    pub repeated: Vec<usize>,
}

/// Images of a list of pairs. Each name is kept once, since all pairs of some images are many more than the images.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImagePairs {
    /// Names of the images.
    pub names: Vec<String>,
    /// The two images of each pair, as places in `names`.
    pub pairs: Vec<[u32; 2]>,
}

/// Numbers names in the order in which they are first met.
#[derive(Default)]
pub(super) struct Numbers(HashMap<String, u32>);

impl Numbers {
    pub fn of(&mut self, name: &str) -> u32 {
        match self.0.get(name) {
            Some(number) => *number,
            None => {
                let next = self.0.len() as u32;
                self.0.insert(name.to_owned(), next);
                next
            }
        }
    }

    /// The names by their numbers.
    fn into_names(self) -> Vec<String> {
        let mut names = vec![String::new(); self.0.len()];
        self.0.into_iter().for_each(|(name, number)| names[number as usize] = name);
        names
    }
}

/// Reads scores from a CSV or a `.npy` file.
///
/// A CSV has the columns `score` (or `similarity`, `cosine`; higher means more alike) and `is_same` (or `same`,
/// `label`, `match`; `1`, `0`, `true`, `false` and the like). It may have the columns `person_a` and `person_b`, the
/// identities of the two images, `group_a` and `group_b`, the groups of people that they belong to, and `image_a` and
/// `image_b`, by which repeated pairs are detected. A `.npy` file has one axis of scores; `labels` is then a second
/// `.npy` file with one axis of zeros and ones.
///
/// # Errors
/// When a file cannot be read, a column is missing or there twice, a field has an invalid value, people or an earlier
/// line contradict `is_same`, a `.npy` file comes without labels or with a different number of them, or a CSV comes
/// with labels.
pub fn read_scores(path: &Path, labels: Option<&Path>) -> Result<ScoreFile> {
    let is_npy = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"));
    let wrong = |what: &str| Error::Evaluation(format!("{}: {what}", path.display()));
    match (is_npy, labels) {
        (true, Some(labels)) => read_npy(path, labels),
        (true, None) => Err(wrong("expected a second .npy file with labels, zeros and ones")),
        (false, Some(_)) => Err(wrong("expected no file of labels: a CSV has its column is_same")),
        (false, None) => read_csv(path),
    }
}

fn read_npy(path: &Path, labels: &Path) -> Result<ScoreFile> {
    let scores = npy::read(path)?;
    let label = |value: f64| match value {
        0.0 => Ok(false),
        1.0 => Ok(true),
        _ => Err(Error::Evaluation(format!("{}: expected zeros and ones, found {value}", labels.display()))),
    };
    let is_same = npy::read(labels)?.into_iter().map(label).collect::<Result<Vec<_>>>()?;
    let comparisons = named(path, Comparisons::new(scores, is_same, None))?;
    Ok(ScoreFile { comparisons, groups: None, images: None, repeated: Vec::new(), with_itself: Vec::new() })
}

fn read_csv(path: &Path) -> Result<ScoreFile> {
    let table = Table::open(path)?;
    let Some(score) = table.find(&SCORE)? else {
        if let Some(distance) = table.find(&["distance", "dist"])? {
            let what = "expected a column score, in which higher means more alike, found distances: negate them";
            return Err(table.error(1, format!("{what} (column {})", distance + 1)));
        }
        return Err(table.column(&SCORE).expect_err("it is not there"));
    };
    let is_same = match (table.find(&SAME_COLUMNS)?, table.find(&MAYBE_SAME_COLUMNS)?) {
        (Some(column), _) | (None, Some(column)) => column,
        (None, None) => table.column(&SAME_COLUMNS)?,
    };
    let both = |name: &str| -> Result<Option<[usize; 2]>> {
        let [a, b] = ["_a", "_b"].map(|side| format!("{name}{side}"));
        match (table.find(&[&a])?, table.find(&[&b])?) {
            (Some(a), Some(b)) => Ok(Some([a, b])),
            (None, None) => Ok(None),
            (Some(_), None) => Err(table.error(1, format!("expected a column {b} beside {a}, found none"))),
            (None, Some(_)) => Err(table.error(1, format!("expected a column {a} beside {b}, found none"))),
        }
    };
    let (people, groups, images) = (both("person")?, both("group")?, both("image")?);
    let mut seen: HashMap<[u32; 2], (usize, bool)> = HashMap::new();
    let mut group_of: BTreeMap<String, (String, usize)> = BTreeMap::new();
    let (mut scores, mut labels, mut who, mut which) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut names, mut image_names) = (Numbers::default(), Numbers::default());
    let (mut repeated, mut with_itself, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    for row in table.rows() {
        let row = row?;
        let field = |column: usize| row.fields[column].as_str();
        let wrong = |what: String| table.error(row.line, what);
        let value = field(score).parse().ok().filter(|s: &f64| s.is_finite());
        scores.push(value.ok_or_else(|| wrong(format!("expected a finite score, found {}", quoted(field(score)))))?);
        let label = truth(field(is_same)).ok_or_else(|| {
            wrong(format!("expected is_same to be 1, 0, true or false, found {}", quoted(field(is_same))))
        })?;
        labels.push(label);
        if let Some(columns) = people {
            who.push(columns.map(|column| names.of(field(column))));
        }
        if let Some(columns) = images {
            let images = columns.map(|column| image_names.of(field(column)));
            if images[0] == images[1] {
                if !label {
                    return Err(wrong(format!("expected {0} to be the same person as {0}", field(columns[0]))));
                }
                with_itself.push(row.line);
            }
            let mut pair = images;
            pair.sort_unstable();
            match seen.get(&pair) {
                Some(&(line, before)) if before != label => {
                    let [a, b] = columns.map(field);
                    return Err(wrong(format!("{a} and {b}: expected is_same as in line {line}, found another")));
                }
                Some(_) => repeated.push(row.line),
                None => drop(seen.insert(pair, (row.line, label))),
            }
            pairs.push(images);
        }
        if let Some(columns) = groups {
            let pair = columns.map(|column| field(column).to_owned());
            for (person, group) in people.into_iter().flatten().zip(&pair) {
                let person = field(person).to_owned();
                let (before, line) = group_of.entry(person.clone()).or_insert_with(|| (group.clone(), row.line));
                if before != group {
                    let what = format!("expected {person} in group {before} as in line {line}, found {group}");
                    return Err(wrong(what));
                }
            }
            which.push(pair);
        }
    }
    // People are numbered by name, so that the order of the lines does not change the bootstrap.
    let mut sorted: Vec<(String, u32)> = names.0.into_iter().collect();
    sorted.sort_unstable();
    let mut number = vec![0; sorted.len()];
    sorted.iter().zip(0..).for_each(|((_, found), sorted)| number[*found as usize] = sorted);
    let who = who.into_iter().map(|pair: [u32; 2]| pair.map(|found| number[found as usize])).collect();
    let comparisons = named(path, Comparisons::new(scores, labels, people.map(|_| who)))?;
    let images = images.map(|_| ImagePairs { names: image_names.into_names(), pairs });
    Ok(ScoreFile { comparisons, groups: groups.map(|_| which), images, repeated, with_itself })
}

/// Adds the path to an evaluation error.
fn named<T>(path: &Path, result: Result<T>) -> Result<T> {
    result.map_err(|error| match error {
        Error::Evaluation(what) => Error::Evaluation(format!("{}: {what}", path.display())),
        other => other,
    })
}

/// Writes scores in a format that [`read_scores`] reads and returns the files: if `path` ends in `.npy`, that file and
/// `NAME-labels.npy` beside it, otherwise a CSV. `images(i)` names the two images of pair `i`, `person` names an
/// identity.
///
/// # Errors
/// When a file cannot be written.
pub fn write_scores(
    path: &Path,
    comparisons: &Comparisons,
    images: impl Fn(usize) -> [String; 2],
    person: impl Fn(u32) -> String,
) -> Result<Vec<PathBuf>> {
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy")) {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let labels = path.with_file_name(format!("{stem}-labels.npy"));
        let values = comparisons.scores().iter().flat_map(|score| score.to_le_bytes());
        files::write_atomic(path, &npy::encode("<f8", &[comparisons.len()], values))?;
        let values = comparisons.is_same().iter().map(|&is_same| u8::from(is_same));
        files::write_atomic(&labels, &npy::encode("|b1", &[comparisons.len()], values))?;
        return Ok(vec![path.to_owned(), labels]);
    }
    let file = files::temporary(path)?;
    let error = |e: csv::Error| Error::Io { path: path.to_owned(), source: std::io::Error::other(e) };
    let mut writer = csv::Writer::from_writer(file);
    let people = comparisons.people();
    let mut header = vec!["image_a", "image_b", "is_same", "score"];
    header.extend(people.map(|_| ["person_a", "person_b"]).into_iter().flatten());
    writer.write_record(header).map_err(error)?;
    for (i, (score, &is_same)) in comparisons.scores().iter().zip(comparisons.is_same()).enumerate() {
        let [a, b] = images(i);
        let mut row = vec![a, b, u8::from(is_same).to_string(), score.to_string()];
        row.extend(people.map(|people| people[i].map(&person)).into_iter().flatten());
        writer.write_record(row).map_err(error)?;
    }
    let file = writer.into_inner().map_err(|e| Error::Io { path: path.to_owned(), source: e.into_error() })?;
    files::persist(file, path)?;
    Ok(vec![path.to_owned()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let comparisons =
            Comparisons::new(vec![0.1 + 0.2, -0.25, 0.5], vec![true, false, true], Some(vec![[7, 7], [7, 2], [2, 2]]));
        let comparisons = comparisons.unwrap();
        let images = |i: usize| [format!("a{i}.jpg"), format!("b, {i}.jpg")];
        let path = folder.path().join("scores.csv");
        write_scores(&path, &comparisons, images, |p| format!("person {p}")).unwrap();
        let read = read_scores(&path, None).unwrap();
        assert_eq!(
            (read.comparisons.scores(), read.comparisons.is_same()),
            (comparisons.scores(), comparisons.is_same())
        );
        assert_eq!(read.comparisons.people(), Some(&[[1, 1], [1, 0], [0, 0]][..]));
        assert_eq!(read.groups, None);

        let path = folder.path().join("scores.npy");
        let written = write_scores(&path, &comparisons, images, |p| p.to_string()).unwrap();
        assert_eq!(written[1], folder.path().join("scores-labels.npy"));
        let read = read_scores(&path, Some(&written[1])).unwrap().comparisons;
        assert_eq!((read.scores(), read.is_same(), read.people()), (comparisons.scores(), comparisons.is_same(), None));
        assert!(read_scores(&path, None).unwrap_err().to_string().contains("a second .npy file with labels"));
        assert!(read_scores(&path, Some(&path)).unwrap_err().to_string().contains("zeros and ones"));
    }

    #[test]
    fn wrong_files_are_errors_that_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.csv");
        let error = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_scores(&path, None).unwrap_err().to_string()
        };
        assert!(error("score,sam\n1,1\n").contains("expected a column is_same"));
        assert!(error("distance,same\n1,1\n").contains("negate them"));
        assert!(error("score,is_same,group_a\n1,1,x\n").contains("expected a column group_b beside group_a"));
        assert!(error("score,Score,same\n1,1,1\n").contains("found score and Score"));
        let pair = "image_a,image_b,is_same,score\n";
        assert!(error(&format!("{pair}a,b,1,0.5\nb,a,0,0.5\n")).contains(":3: b and a: expected is_same as in line 2"));
        let groups = "score,is_same,person_a,person_b,group_a,group_b\n0.5,1,a,a,x,x\n0.1,0,a,b,y,y\n";
        assert!(error(groups).contains(":3: expected a in group x as in line 2, found y"), "{}", error(groups));
        assert!(error(&format!("{pair}a,a,0,0.5\n")).contains("expected a to be the same person as a"));
        assert!(error("score,is_same\n0.5,1\nNaN,0\n").contains(":3: expected a finite score, found \"NaN\""));
        assert!(error("score,is_same\n0.5,maybe\n").contains(":2: expected is_same to be"));
        std::fs::write(&path, "image_a,image_b,is_same,score\na,b,1,0.5\na,c,0,0.1\nb,a,1,0.5\n").unwrap();
        assert_eq!(read_scores(&path, None).unwrap().repeated, [4]);
        let text = "score,is_same,person_a,person_b\n0.5,1,ann,bob\n";
        assert!(error(text).contains("pair 0: expected one person"), "{}", error(text));
    }
}
