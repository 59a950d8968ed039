//! Labels of a data set's images, numbered from 0 without gaps, and the names of its people.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::lists::whole;

/// A label for each image, and a name for each label.
#[derive(Clone, Debug, Default)]
pub(super) struct Classes {
    labels: Vec<u32>,
    names: Names,
}

#[derive(Clone, Debug)]
enum Names {
    /// The set's own numbers of its people, ascending; there may be gaps.
    Numbers(Vec<i64>),
    Texts(Vec<String>),
}

impl Default for Names {
    fn default() -> Self {
        Self::Numbers(Vec::new())
    }
}

impl Classes {
    /// Numbers the people by their labels. If all labels are whole numbers, also written as `3.0`, the people are in
    /// their order and named after the folders of their images where possible; otherwise the labels are the names, and
    /// so they are where a number has leading zeros, so that `7` and `007` stay two people.
    pub fn from_labels(labels: Vec<String>, paths: &Paths, path: &Path) -> Result<Self> {
        let is_padded = |label: &String| label.len() > 1 && label.starts_with('0') && !label.starts_with("0.");
        let has_padded = labels.iter().any(is_padded);
        let numbers = labels.iter().map(|label| whole(label).filter(|_| !has_padded)).collect::<Option<Vec<i64>>>();
        match numbers {
            Some(numbers) => Ok(Self::from_numbers(&numbers, path)?.with_folders(paths)),
            None => Self::from_texts(labels, path),
        }
    }

    /// Numbers the people in the order of the set's own numbers.
    pub fn from_numbers(numbers: &[i64], path: &Path) -> Result<Self> {
        let mut distinct = numbers.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        distinct.shrink_to_fit();
        check_number(distinct.len(), path)?;
        // Most sets have no gaps.
        let is_dense =
            distinct.first() == Some(&0) && distinct.last().is_some_and(|&last| last == distinct.len() as i64 - 1);
        let label =
            |number: &i64| if is_dense { *number as u32 } else { distinct.partition_point(|d| d < number) as u32 };
        Ok(Self { labels: numbers.iter().map(label).collect(), names: Names::Numbers(distinct) })
    }

    /// Numbers the people in the byte order of their names.
    pub fn from_texts(texts: Vec<String>, path: &Path) -> Result<Self> {
        let mut number_of: BTreeMap<String, u32> = texts.iter().map(|text| (text.clone(), 0)).collect();
        check_number(number_of.len(), path)?;
        number_of.values_mut().zip(0..).for_each(|(number, i)| *number = i);
        let labels = texts.iter().map(|text| number_of[text]).collect();
        Ok(Self { labels, names: Names::Texts(number_of.into_keys().collect()) })
    }

    /// Names the people after the folders of their images, if all images of each person are in one folder that no other
    /// person has.
    pub fn with_folders(mut self, paths: &Paths) -> Self {
        let mut names: Vec<Option<&str>> = vec![None; self.num_identities()];
        for (path, &label) in paths.iter().zip(&self.labels) {
            let folder = path.rsplit_once('/').map(|(folders, _)| folders.rsplit('/').next().unwrap_or(folders));
            let Some(folder) = folder.filter(|f| !f.is_empty()) else { return self };
            if names[label as usize].replace(folder).is_some_and(|known| known != folder) {
                return self;
            }
        }
        let Some(names) = names.into_iter().collect::<Option<Vec<&str>>>() else { return self };
        let mut sorted = names.clone();
        sorted.sort_unstable();
        if sorted.windows(2).all(|pair| pair[0] != pair[1]) {
            self.names = Names::Texts(names.into_iter().map(str::to_owned).collect());
        }
        self
    }

    /// Names the people by `names`, indexed by the set's own numbers, if every number has a name.
    #[cfg(any(test, feature = "parquet"))]
    pub fn with_names(mut self, names: &[String]) -> Self {
        if let Names::Numbers(numbers) = &self.names {
            let name = |&number: &i64| usize::try_from(number).ok().and_then(|n| names.get(n)).cloned();
            if let Some(names) = numbers.iter().map(name).collect::<Option<Vec<_>>>() {
                self.names = Names::Texts(names);
            }
        }
        self
    }

    pub fn num_images(&self) -> usize {
        self.labels.len()
    }

    pub fn num_identities(&self) -> usize {
        match &self.names {
            Names::Numbers(numbers) => numbers.len(),
            Names::Texts(texts) => texts.len(),
        }
    }

    pub fn label(&self, index: usize) -> u32 {
        self.labels[index]
    }

    pub fn name(&self, label: u32) -> String {
        match &self.names {
            Names::Numbers(numbers) => numbers[label as usize].to_string(),
            Names::Texts(texts) => texts[label as usize].clone(),
        }
    }
}

fn check_number(num: usize, path: &Path) -> Result<()> {
    match num {
        0 => Err(Error::Data { path: path.to_owned(), what: "expected images, found none".to_owned() }),
        n if u32::try_from(n).is_err() => {
            Err(Error::Data { path: path.to_owned(), what: format!("expected at most {} identities", u32::MAX) })
        }
        _ => Ok(()),
    }
}

/// Paths of images in the data set, concatenated in one string.
#[derive(Clone, Debug, Default)]
pub(super) struct Paths {
    text: String,
    ends: Vec<usize>,
}

impl Paths {
    pub fn push(&mut self, path: &str) {
        self.text.push_str(path);
        self.ends.push(self.text.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn get(&self, index: usize) -> &str {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..self.ends[index]]
    }

    /// Last component of a path.
    pub fn file_name(&self, index: usize) -> &str {
        let path = self.get(index);
        path.rsplit('/').next().unwrap_or(path)
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|i| self.get(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_gaps_and_names_are_numbered_through() -> Result<()> {
        let path = Path::new("set");
        let gaps = Classes::from_numbers(&[7, 2, 7, 900], path)?;
        assert_eq!((gaps.labels.as_slice(), gaps.num_identities()), ([1, 0, 1, 2].as_slice(), 3));
        assert_eq!((0..3).map(|l| gaps.name(l)).collect::<Vec<_>>(), ["2", "7", "900"]);
        let dense = Classes::from_numbers(&[1, 0, 2], path)?.with_names(&["a".into(), "b".into(), "c".into()]);
        assert_eq!((dense.label(0), dense.name(1)), (1, "b".to_owned()));
        let texts = Classes::from_texts(vec!["zoe".into(), "ann".into(), "zoe".into()], path)?;
        assert_eq!((texts.labels.as_slice(), texts.name(1)), ([1, 0, 1].as_slice(), "zoe".to_owned()));
        assert!(Classes::from_numbers(&[], path).is_err());
        Ok(())
    }

    #[test]
    fn folders_name_people_only_where_each_has_one_of_its_own() -> Result<()> {
        let classes = Classes::from_numbers(&[0, 1, 1], Path::new("set"))?;
        let named = |names: [&str; 3]| {
            let mut paths = Paths::default();
            names.into_iter().for_each(|name| paths.push(name));
            classes.clone().with_folders(&paths).name(1)
        };
        assert_eq!(named(["a/1.jpg", "x/b/1.jpg", "b/2.jpg"]), "b");
        assert_eq!(named(["a/1.jpg", "b/1.jpg", "c/2.jpg"]), "1", "two folders of one person");
        assert_eq!(named(["a/1.jpg", "a/2.jpg", "a/3.jpg"]), "1", "one folder of two people");
        assert_eq!(named(["a/1.jpg", "2.jpg", "b/3.jpg"]), "1");
        Ok(())
    }
}
