//! Named daemons, where docker's client keeps them, too: a context that one of the two has made serves
//! both.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::credentials::Config;
use crate::endpoint::TlsFiles;

/// The one that is there without being made: what flags and environment say.
pub(crate) const DEFAULT: &str = "default";

/// Where contexts lie.
pub(crate) struct ContextStore {
    dir: PathBuf,
}

/// A named daemon.
#[derive(Clone, Debug)]
pub(crate) struct NamedContext {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) host: String,
    pub(crate) skip_verify: bool,
    /// Where its files of TLS lie.
    pub(crate) tls_dir: PathBuf,
}

impl NamedContext {
    /// What TLS is spoken with; none if the context has nothing to do with it.
    pub(crate) fn tls(&self) -> Option<TlsFiles> {
        let files = TlsFiles { skip_verify: self.skip_verify, ..TlsFiles::in_dir(&self.tls_dir) };
        (self.skip_verify || files.ca.is_some() || files.cert.is_some()).then_some(files)
    }
}

impl ContextStore {
    pub(crate) fn open() -> anyhow::Result<Self> {
        Ok(Self { dir: Config::dir()?.join("contexts") })
    }

    fn meta(&self, name: &str) -> PathBuf {
        self.dir.join("meta").join(digest(name)).join("meta.json")
    }

    fn tls_dir(&self, name: &str) -> PathBuf {
        self.dir.join("tls").join(digest(name)).join("docker")
    }

    pub(crate) fn find(&self, name: &str) -> anyhow::Result<NamedContext> {
        let path = self.meta(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("context {name:?} does not exist: 'skep context ls' shows those that do")
            }
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        self.read(&bytes).with_context(|| format!("{} is no context", path.display()))
    }

    fn read(&self, bytes: &[u8]) -> anyhow::Result<NamedContext> {
        let meta: Value = serde_json::from_slice(bytes)?;
        let name = meta["Name"].as_str().context("it has no name")?.to_owned();
        let endpoint = &meta["Endpoints"]["docker"];
        Ok(NamedContext {
            description: meta["Metadata"]["Description"].as_str().unwrap_or_default().to_owned(),
            host: endpoint["Host"].as_str().context("it names no host")?.to_owned(),
            skip_verify: endpoint["SkipTLSVerify"].as_bool().unwrap_or(false),
            tls_dir: self.tls_dir(&name),
            name,
        })
    }

    /// All of them, by name.
    pub(crate) fn list(&self) -> Vec<NamedContext> {
        let entries = fs::read_dir(self.dir.join("meta")).into_iter().flatten().flatten();
        let contexts = entries.filter_map(|entry| self.read(&fs::read(entry.path().join("meta.json")).ok()?).ok());
        let mut contexts: Vec<_> = contexts.collect();
        contexts.sort_by(|a, b| a.name.cmp(&b.name));
        contexts
    }

    /// Keeps a context; files of TLS that are not named stay as they are.
    pub(crate) fn keep(&self, context: &NamedContext, tls: &TlsFiles) -> anyhow::Result<()> {
        let dir = self.tls_dir(&context.name);
        for (name, from) in [("ca.pem", &tls.ca), ("cert.pem", &tls.cert), ("key.pem", &tls.key)] {
            let Some(from) = from else { continue };
            let bytes = fs::read(from).with_context(|| format!("{} cannot be read", from.display()))?;
            write_private(&dir.join(name), &bytes)?;
        }
        let meta = json!({
            "Name": context.name,
            "Metadata": {"Description": context.description},
            "Endpoints": {"docker": {"Host": context.host, "SkipTLSVerify": context.skip_verify}},
        });
        write_private(&self.meta(&context.name), meta.to_string().as_bytes())
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        self.meta(name).exists()
    }

    pub(crate) fn remove(&self, name: &str) -> anyhow::Result<()> {
        for kind in ["meta", "tls"] {
            let dir = self.dir.join(kind).join(digest(name));
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("{} cannot be removed", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Docker names directories by it.
fn digest(name: &str) -> String {
    format!("{:x}", Sha256::digest(name))
}

/// Whether contexts may be called so.
pub(crate) fn check_name(name: &str) -> anyhow::Result<()> {
    let valid = name.len() > 1
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.+-".contains(c));
    if name == DEFAULT {
        bail!("the context {DEFAULT:?} is always there, and is what flags and environment say");
    }
    if !valid {
        bail!("{name:?} is no context name: it has two or more of a-z, A-Z, 0-9, _, ., + and -");
    }
    Ok(())
}

fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let write = || -> io::Result<()> {
        let dir = path.parent().unwrap_or(path);
        fs::create_dir_all(dir)?;
        let part = path.with_extension("part");
        let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&part)?;
        file.write_all(bytes)?;
        fs::rename(part, path)
    };
    write().with_context(|| format!("{} cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_lie_where_docker_looks_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContextStore { dir: dir.path().join("contexts") };
        let ca = dir.path().join("some-ca");
        fs::write(&ca, "ca").unwrap();
        let hive = NamedContext {
            name: "hive".into(),
            description: "bees".into(),
            host: "tcp://hive:2376".into(),
            skip_verify: false,
            tls_dir: PathBuf::new(),
        };
        store.keep(&hive, &TlsFiles { ca: Some(ca), ..TlsFiles::default() }).unwrap();
        let digest = "7640da40298286a6e462d5a80f1c608b0df8660fb13bd5aad0f32b6db68b42c0";
        assert!(dir.path().join("contexts/meta").join(digest).join("meta.json").exists());
        let found = store.find("hive").unwrap();
        assert_eq!((found.host.as_str(), found.description.as_str()), ("tcp://hive:2376", "bees"));
        assert!(found.tls().unwrap().ca.is_some());
        assert!(store.find("comb").unwrap_err().to_string().contains("comb"));
        store.remove("hive").unwrap();
        assert!(store.list().is_empty());
        for wrong in ["", "a", "default", "../up", "-x"] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }
}
