//! Named daemons, where docker's client keeps them, too: a context that one of the two has made serves
//! both.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::credentials::Config;
use crate::endpoint::TlsFiles;

/// The one that is there without being made: what flags and environment say.
pub(crate) const DEFAULT: &str = "default";

/// In an archive: what a context stands for, and where its files of TLS lie.
const META: &str = "meta.json";
const TLS: &str = "tls/docker/";
const FILES: [&str; 3] = ["ca.pem", "cert.pem", "key.pem"];
/// The largest archive that is read, in bytes.
const EXPORT_LEN_MAX: u64 = 10 << 20;

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
        self.write(context, &contents(tls)?)
    }

    fn write(&self, context: &NamedContext, tls: &[(String, Vec<u8>)]) -> anyhow::Result<()> {
        let dir = self.tls_dir(&context.name);
        for (name, bytes) in tls {
            write_private(&dir.join(name), bytes)?;
        }
        write_private(&self.meta(&context.name), meta(context).to_string().as_bytes())
    }

    /// Packs a context, its private key with it, as docker's client does.
    pub(crate) fn export(&self, name: &str, to: impl io::Write) -> anyhow::Result<()> {
        let context = self.find(name)?;
        let tls = contents(&TlsFiles::in_dir(&context.tls_dir))?;
        let mut archive = tar::Builder::new(to);
        let mut add = |path: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            archive.append_data(&mut header, path, bytes)
        };
        add(META, meta(&context).to_string().as_bytes())?;
        for (file, bytes) in &tls {
            add(&format!("{TLS}{file}"), bytes)?;
        }
        archive.into_inner()?.flush()?;
        Ok(())
    }

    /// Keeps what was packed, under a name of one's choice.
    pub(crate) fn import(&self, name: &str, from: impl io::Read) -> anyhow::Result<()> {
        check_name(name)?;
        if self.exists(name) {
            bail!("context {name:?} already exists: remove it with 'skep context rm', or choose another name");
        }
        let (mut packed, mut tls) = (None, Vec::new());
        let mut whole = Vec::new();
        let len = from.take(EXPORT_LEN_MAX).read_to_end(&mut whole)? as u64;
        // Docker's client leaves out the end of the archive, and what fills its last file up.
        whole.resize(whole.len().next_multiple_of(512) + 1024, 0);
        let mut archive = tar::Archive::new(whole.as_slice());
        for entry in archive.entries()? {
            let mut entry = entry.context("it is no archive of 'context export'")?;
            let path = entry.path()?.to_string_lossy().into_owned();
            if entry.header().entry_type().is_dir() {
                continue;
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            anyhow::ensure!(entry.raw_file_position() + entry.size() <= len, "it ends in the middle of {path}");
            match path.strip_prefix(TLS) {
                None if path == META => packed = Some(self.read(&bytes).with_context(|| format!("its {META}"))?),
                Some(file) if FILES.contains(&file) => tls.push((file.to_owned(), bytes)),
                _ => bail!("it has a file {path:?}, which no context has"),
            }
        }
        let packed = packed.with_context(|| format!("it is no archive of 'context export': it has no {META}"))?;
        self.write(&NamedContext { name: name.to_owned(), ..packed }, &tls)
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

/// What a context is kept and packed as.
fn meta(context: &NamedContext) -> Value {
    json!({
        "Name": context.name,
        "Metadata": {"Description": context.description},
        "Endpoints": {"docker": {"Host": context.host, "SkipTLSVerify": context.skip_verify}},
    })
}

/// The files of TLS, by the names that they are kept under.
fn contents(tls: &TlsFiles) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let files = FILES.into_iter().zip([&tls.ca, &tls.cert, &tls.key]);
    let there = files.filter_map(|(name, from)| Some((name, from.as_ref()?)));
    let read = |(name, from): (&str, &PathBuf)| {
        let bytes = fs::read(from).with_context(|| format!("{} cannot be read", from.display()))?;
        Ok((name.to_owned(), bytes))
    };
    there.map(read).collect()
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

        // Packed and unpacked.
        let mut packed = Vec::new();
        store.export("hive", &mut packed).unwrap();
        store.import("far", packed.as_slice()).unwrap();
        let far = store.find("far").unwrap();
        assert_eq!(
            (far.name.as_str(), far.host.as_str(), far.description.as_str()),
            ("far", "tcp://hive:2376", "bees")
        );
        assert_eq!(fs::read(far.tls().unwrap().ca.unwrap()).unwrap(), b"ca");
        let refused = |name: &str, packed: &[u8]| format!("{:#}", store.import(name, packed).unwrap_err());
        assert!(refused("far", &packed).contains("already exists"));
        assert!(refused("other", b"").contains("no meta.json"));
        assert!(refused("other", &[7; 1024]).contains("no archive"));
        let mut strange = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        strange.append_data(&mut header, "tls/docker/more.pem", io::empty()).unwrap();
        assert!(refused("other", &strange.into_inner().unwrap()).contains("more.pem"));
        let cut = &packed[..512 + 40];
        assert!(refused("other", cut).contains("middle of meta.json"));
        // As docker's client writes it.
        let ca_ends = 3 * 512 + 2;
        store.import("from-docker", &packed[..ca_ends]).unwrap();
        assert!(store.find("from-docker").unwrap().tls().unwrap().ca.is_some());
        store.remove("from-docker").unwrap();
        assert!(!store.exists("other"));
        store.remove("far").unwrap();
        store.remove("hive").unwrap();
        assert!(store.list().is_empty());
        for wrong in ["", "a", "default", "../up", "-x"] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }
}
