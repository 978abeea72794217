//! What a build may copy from: a directory of files, less what `.dockerignore` names.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use sha2::{Digest as _, Sha256};

use crate::sys;

const IGNORE_LEN_MAX: u64 = 1 << 20;

/// Files that can be copied.
#[derive(Debug)]
pub(crate) struct Sources {
    root: PathBuf,
    /// Whether who owns the files is part of what is copied.
    has_owners: bool,
    ignored: Vec<(GlobMatcher, bool)>,
    /// What one instruction leaves out, seen from each source that it names.
    excluded: Vec<GlobMatcher>,
}

/// What an instruction's source names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// Within the root.
    pub(crate) path: PathBuf,
    /// The directories below the target that it comes to, if it keeps those that it lies in.
    pub(crate) below: Option<PathBuf>,
}

impl From<PathBuf> for Named {
    fn from(path: PathBuf) -> Self {
        Self { path, below: None }
    }
}

impl Sources {
    /// A build's context, which may leave files out; the Dockerfile may lie elsewhere.
    pub(crate) fn context(root: &Path, dockerfile_dir: &Path, dockerfile: &str) -> io::Result<Self> {
        let own = format!("{dockerfile}.dockerignore");
        let file = sys::open_in_root(dockerfile_dir, Path::new(&own))
            .or_else(|_| sys::open_in_root(root, Path::new(".dockerignore")));
        let patterns = file.map_or(Ok(Vec::new()), read_patterns)?;
        let ignored = patterns.iter().map(|(pattern, again)| Ok((glob(pattern)?, *again)));
        Ok(Self {
            root: root.to_owned(),
            has_owners: false,
            ignored: ignored.collect::<io::Result<_>>()?,
            excluded: Vec::new(),
        })
    }

    /// All files of a file system.
    pub(crate) fn whole(root: &Path) -> Self {
        Self { root: root.to_owned(), has_owners: true, ignored: Vec::new(), excluded: Vec::new() }
    }

    /// The same without what `patterns` name, seen from each source.
    pub(crate) fn excluding(&self, patterns: &[String]) -> io::Result<Self> {
        let excluded = patterns.iter().map(|pattern| glob(&clean(pattern).to_string_lossy()));
        Ok(Self {
            root: self.root.clone(),
            has_owners: self.has_owners,
            ignored: self.ignored.clone(),
            excluded: excluded.collect::<io::Result<_>>()?,
        })
    }

    /// Whether what the source `named` has at `path` is left out of the copy.
    pub(crate) fn is_left_out(&self, named: &Path, path: &Path) -> bool {
        let seen = match path.strip_prefix(named) {
            Ok(below) if below.as_os_str().is_empty() => path.file_name().map(Path::new).unwrap_or(below),
            Ok(below) => below,
            Err(_) => path,
        };
        let parts = || seen.ancestors().filter(|part| !part.as_os_str().is_empty());
        self.is_ignored(path) || self.excluded.iter().any(|pattern| parts().any(|part| pattern.is_match(part)))
    }

    /// What `pattern` names, with the directories that it lies in: all of them, or those behind `/./`.
    pub(crate) fn find_with_parents(&self, pattern: &str) -> io::Result<Vec<Named>> {
        let kept_from = pattern.split_once("/./").map(|(before, _)| clean(before)).unwrap_or_default();
        let found = self.find_to(pattern, if pattern.contains("**") { usize::MAX } else { 0 })?;
        let named = |path: PathBuf| {
            let kept = path.strip_prefix(&kept_from).unwrap_or(&path).to_owned();
            let is_dir = sys::open_in_root(&self.root, &path)?.metadata()?.is_dir();
            let below = if is_dir { kept } else { kept.parent().map(Path::to_owned).unwrap_or_default() };
            Ok(Named { path, below: Some(below) })
        };
        found.into_iter().map(named).collect()
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the path is left out: the last pattern that says something of it, or of what it lies in, wins.
    pub(crate) fn is_ignored(&self, path: &Path) -> bool {
        let mut ignored = false;
        for (pattern, again) in &self.ignored {
            if path.ancestors().filter(|part| !part.as_os_str().is_empty()).any(|part| pattern.is_match(part)) {
                ignored = !again;
            }
        }
        ignored
    }

    /// The paths that `pattern` names, within the root and without a leading slash.
    pub(crate) fn find(&self, pattern: &str) -> io::Result<Vec<Named>> {
        Ok(self.find_to(pattern, 0)?.into_iter().map(Named::from).collect())
    }

    /// Looks at least `depth` directories deep.
    fn find_to(&self, pattern: &str, depth: usize) -> io::Result<Vec<PathBuf>> {
        let path = clean(pattern);
        let text = path.to_string_lossy();
        if !text.contains(['*', '?', '[']) {
            // Whatever is left out is as good as absent, unless some of it is let in again.
            let there = path.as_os_str().is_empty() || sys::open_in_root(&self.root, &path).is_ok();
            let gone = self.is_ignored(&path) && !self.ignored.iter().any(|(_, again)| *again);
            return if there && !gone { Ok(vec![path]) } else { Err(missing(pattern)) };
        }
        let depth = path.components().count().max(depth);
        let matcher = glob(&text)?;
        let mut found = BTreeSet::new();
        let mut open = vec![PathBuf::new()];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(self.root.join(&dir))?.flatten() {
                let below = dir.join(entry.file_name());
                if matcher.is_match(&below) && !self.is_ignored(&below) {
                    found.insert(below.clone());
                }
                if below.components().count() < depth && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    open.push(below);
                }
            }
        }
        if found.is_empty() { Err(missing(pattern)) } else { Ok(found.into_iter().collect()) }
    }

    /// Whether who owns the files is part of what is copied.
    pub(crate) fn has_owners(&self) -> bool {
        self.has_owners
    }

    /// A digest of all that copying `path` would bring: names, modes, content. A link that is named
    /// itself stands for what it leads to, as when it is copied.
    pub(crate) fn hash(&self, path: &Path, into: &mut Sha256) -> io::Result<()> {
        let file = sys::open_in_root(&self.root, path)?;
        let full = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        self.hash_at(path, &full, path, into)
    }

    fn hash_at(&self, named: &Path, full: &Path, path: &Path, into: &mut Sha256) -> io::Result<()> {
        let meta = fs::symlink_metadata(full)?;
        if !meta.is_dir() && self.is_left_out(named, path) {
            return Ok(());
        }
        into.update(path.to_string_lossy().as_bytes());
        into.update(meta.mode().to_le_bytes());
        if self.has_owners {
            into.update(meta.uid().to_le_bytes());
            into.update(meta.gid().to_le_bytes());
        }
        if meta.is_symlink() {
            into.update(fs::read_link(full)?.to_string_lossy().as_bytes());
        } else if meta.is_dir() {
            let mut names: Vec<_> = fs::read_dir(full)?.flatten().map(|entry| entry.file_name()).collect();
            names.sort();
            for name in names {
                self.hash_at(named, &full.join(&name), &path.join(&name), into)?;
            }
        } else if meta.is_file() {
            into.update(meta.len().to_le_bytes());
            io::copy(&mut fs::File::open(full)?, into)?;
        }
        Ok(())
    }
}

/// What a file like `.dockerignore` leaves out, and whether it lets that in again.
fn read_patterns(file: fs::File) -> io::Result<Vec<(String, bool)>> {
    let mut text = String::new();
    file.take(IGNORE_LEN_MAX).read_to_string(&mut text)?;
    // Some editors begin a file with a byte-order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let pattern = |line: &str| {
        let (pattern, again) = line.strip_prefix('!').map_or((line, false), |pattern| (pattern.trim(), true));
        (clean(pattern).to_string_lossy().into_owned(), again)
    };
    Ok(lines.map(pattern).collect())
}

/// The patterns of a file like `.dockerignore` in a directory, as those who send files take them.
pub fn ignored_patterns(dir: &Path, name: &str) -> io::Result<Vec<String>> {
    let patterns = read_patterns(sys::open_in_root(dir, &clean(name))?)?;
    Ok(patterns.into_iter().map(|(pattern, again)| if again { format!("!{pattern}") } else { pattern }).collect())
}

fn missing(pattern: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("file not found in build context or excluded by .dockerignore: stat {pattern}: file does not exist"),
    )
}

fn glob(pattern: &str) -> io::Result<GlobMatcher> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// A path within the root: without leading slash, `.` and `..`.
pub(crate) fn clean(path: &str) -> PathBuf {
    let mut out = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(part) => out.push(part),
            Component::ParentDir => drop(out.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_find_and_leave_out() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["a.txt", "b.txt", "src/c.txt", "src/deep/d.o", "target/x"] {
            fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            fs::write(dir.path().join(path), path).unwrap();
        }
        fs::write(dir.path().join(".dockerignore"), "# no\n*.txt\n!b.txt\n**/*.o\n/target\n").unwrap();
        let sources = Sources::context(dir.path(), dir.path(), "Dockerfile").unwrap();
        let ignored = |path: &str| sources.is_ignored(Path::new(path));
        assert!(ignored("a.txt") && !ignored("b.txt") && !ignored("src/c.txt"));
        assert!(ignored("src/deep/d.o") && ignored("target/x") && ignored("target"));
        let find = |pattern| sources.find(pattern).unwrap().into_iter().map(|named| named.path).collect::<Vec<_>>();
        assert_eq!(find("*.txt"), [Path::new("b.txt")]);
        assert_eq!(find("./src/../b.txt"), [Path::new("b.txt")]);
        assert_eq!(find("../../src/*"), [Path::new("src/c.txt"), Path::new("src/deep")]);
        assert!(sources.find("none").is_err());
        assert_eq!(ignored_patterns(dir.path(), ".dockerignore").unwrap()[1], "!b.txt");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("led.dockerignore")).unwrap();
        assert!(ignored_patterns(dir.path(), "led.dockerignore").is_err(), "a link leads to the host's files");
        let hash = |path: &str| {
            let mut hash = Sha256::new();
            sources.hash(Path::new(path), &mut hash).unwrap();
            hash.finalize()
        };
        let before = (hash("src"), hash("b.txt"));
        fs::write(dir.path().join("src/deep/d.o"), "other").unwrap();
        assert_eq!(before.0, hash("src"), "what is left out does not count");
        std::os::unix::fs::symlink("b.txt", dir.path().join("link")).unwrap();
        let by_link = hash("link");
        fs::write(dir.path().join("b.txt"), "other").unwrap();
        assert_ne!(before.1, hash("b.txt"));
        assert_ne!(by_link, hash("link"), "a link that is named stands for what it leads to");
    }
}
