//! `RUN --mount`: what a command is shown beside its layers, of which no layer has anything. Files of the context, of
//! stages and of images are copies; caches outlive builds; secrets lie in memory.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::build::builder::{BuildError, Builder, Stage, absolute, key};
use crate::build::context::clean;
use crate::build::copying::Origin;
use crate::build::parse::Instruction;
use crate::build::stage::{self, CopyOptions};
use crate::build::words;
use crate::container::config::{ContainerConfig, ContainerMount, MountSource, Payload};
use crate::container::logs::config::parse_size;
use crate::sys;
use crate::turns::Turn;

/// One `--mount`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RunMount {
    /// Absolute; empty for a secret that is a variable alone.
    target: String,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Bind {
        from: String,
        source: String,
        writable: bool,
    },
    Cache {
        id: String,
        sharing: Sharing,
        owner: (u32, u32),
        mode: u32,
        read_only: bool,
        /// What a new one begins with, if it is to begin with anything.
        from: String,
        source: String,
    },
    Tmpfs {
        size_bytes: Option<i64>,
    },
    Secret {
        id: String,
        variable: String,
        required: bool,
        owner: (u32, u32),
        mode: u32,
    },
    /// The agent that holds keys of the client's.
    Ssh {
        id: String,
        required: bool,
        owner: (u32, u32),
        mode: u32,
    },
}

/// What those get who want a cache that somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Shared,
    /// Another one.
    Private,
    /// It, when its turn comes.
    Locked,
}

/// Where agents' sockets are, unless a mount says otherwise.
const AGENTS: &str = "/run/buildkit/ssh_agent";

/// What a mount's place may be called.
const TARGET: [&str; 3] = ["target", "dst", "destination"];

/// What a mount of a type may say beside its target.
fn known_keys(kind: &str, has_origin: bool) -> Result<&'static [&'static str], String> {
    Ok(match kind {
        "bind" => &["source", "src", "from", "rw", "readwrite", "ro", "readonly"],
        "cache" if has_origin => {
            &["id", "sharing", "from", "source", "src", "uid", "gid", "mode", "ro", "readonly", "rw", "readwrite"]
        }
        "cache" => &["id", "sharing", "uid", "gid", "mode", "ro", "readonly", "rw", "readwrite"],
        "tmpfs" => &["size"],
        "secret" => &["id", "source", "src", "env", "required", "uid", "gid", "mode"],
        "ssh" => &["id", "required", "uid", "gid", "mode"],
        other => return Err(format!("unsupported mount type {other:?}: use bind, cache, tmpfs, secret or ssh")),
    })
}

/// Reads `type=…,target=…`; paths are below the working directory.
pub(super) fn parse(text: &str, working_dir: &str) -> Result<RunMount, String> {
    let pairs: Vec<(&str, &str)> = text.split(',').map(|part| part.split_once('=').unwrap_or((part, ""))).collect();
    let read = |names: &[&str]| pairs.iter().rev().find(|(name, _)| names.contains(name)).map(|(_, value)| *value);
    let truth = |names: &[&str]| match read(names) {
        None => Ok(None),
        Some("") => Ok(Some(true)),
        Some(value) => value.parse().map(Some).map_err(|_| format!("{}={value:?} is neither true nor false", names[0])),
    };
    let number = |name: &str, usual: u32, base: u32| match read(&[name]) {
        None => Ok(usual),
        Some(value) => u32::from_str_radix(value, base).map_err(|_| format!("{name}={value:?} is no number")),
    };
    let kind = read(&["type"]).unwrap_or("bind");
    let known = known_keys(kind, read(&["from"]).is_some_and(|from| !from.is_empty()))?;
    let unknown = pairs.iter().find(|(name, _)| *name != "type" && !TARGET.contains(name) && !known.contains(name));
    if let Some((name, _)) = unknown {
        return Err(format!("unexpected key '{name}' for a mount of type {kind}"));
    }
    let owner = || Ok::<_, String>((number("uid", 0, 10)?, number("gid", 0, 10)?));
    let read_only = || Ok::<_, String>(truth(&["ro", "readonly"])?.unwrap_or(false));
    let named = read(&TARGET).filter(|target| !target.is_empty()).map(|target| absolute(working_dir, target));
    let needed = || named.clone().ok_or_else(|| format!("a mount of type {kind} needs a target"));
    Ok(match kind {
        "bind" => {
            let source = read(&["source", "src"]).unwrap_or("/").to_owned();
            let writable = truth(&["rw", "readwrite"])?.unwrap_or(false) && !read_only()?;
            let from = read(&["from"]).unwrap_or_default().to_owned();
            RunMount { target: needed()?, kind: Kind::Bind { from, source, writable } }
        }
        "cache" => {
            let target = needed()?;
            let sharing = match read(&["sharing"]).unwrap_or("shared") {
                "shared" => Sharing::Shared,
                "private" => Sharing::Private,
                "locked" => Sharing::Locked,
                other => return Err(format!("sharing={other:?} is unknown: use shared, private or locked")),
            };
            let id = read(&["id"]).unwrap_or(&target).to_owned();
            let (owner, mode, read_only) = (owner()?, number("mode", 0o755, 8)?, read_only()?);
            let from = read(&["from"]).unwrap_or_default().to_owned();
            let source = read(&["source", "src"]).unwrap_or("/").to_owned();
            RunMount { target, kind: Kind::Cache { id, sharing, owner, mode, read_only, from, source } }
        }
        "tmpfs" => {
            let size = read(&["size"]).map(|size| parse_size(size).and_then(|size| i64::try_from(size).ok()));
            let size_bytes = size.map(|size| size.ok_or("its size is no size such as 64m")).transpose()?;
            RunMount { target: needed()?, kind: Kind::Tmpfs { size_bytes } }
        }
        "secret" => {
            let variable = read(&["env"]).unwrap_or_default().to_owned();
            let id = read(&["id"]).or_else(|| read(&["source", "src"]));
            let of_target = || named.as_deref().and_then(|target| target.rsplit('/').next());
            let id = id.or_else(of_target).ok_or("a secret needs an id or a target")?.to_owned();
            let target = match named {
                Some(target) => target,
                None if variable.is_empty() => format!("/run/secrets/{id}"),
                None => String::new(),
            };
            let required = truth(&["required"])?.unwrap_or(false);
            let (owner, mode) = (owner()?, number("mode", 0o400, 8)?);
            RunMount { target, kind: Kind::Secret { id, variable, required, owner, mode } }
        }
        _ => {
            let id = read(&["id"]).filter(|id| !id.is_empty()).unwrap_or("default").to_owned();
            let required = truth(&["required"])?.unwrap_or(false);
            let (owner, mode) = (owner()?, number("mode", 0o600, 8)?);
            let target = named.unwrap_or_else(|| format!("{AGENTS}.{id}"));
            RunMount { target, kind: Kind::Ssh { id, required, owner, mode } }
        }
    })
}

/// The stages and images that an instruction's mounts are from, as they are written.
pub(super) fn origins(instruction: &Instruction) -> impl Iterator<Item = String> + '_ {
    let mounts = instruction.flags.iter().filter(|(flag, _)| flag == "mount");
    mounts.filter_map(|(_, text)| text.split(',').find_map(|part| part.strip_prefix("from=")).map(str::to_owned))
}

/// What a command's mounts need while it runs; gone when it is dropped.
#[derive(Default)]
pub(super) struct Held {
    copies: Vec<PathBuf>,
    turns: Vec<Turn>,
    agents: Vec<AbortOnDropHandle<()>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        for copy in &self.copies {
            if let Err(error) = fs::remove_dir_all(copy) {
                tracing::warn!(%error, "a build left something behind");
            }
        }
    }
}

/// What an agent's socket is called in its directory.
const SOCKET: &str = "agent";
/// Connections to an agent at a time.
const CONNECTIONS_MAX: usize = 64;

/// Where a bind's source is copied to: a name that says nothing of it.
const COPY: &str = "it";

impl Builder {
    /// The mounts of an instruction.
    pub(super) fn mounts(&self, stage: &Stage, instruction: &Instruction) -> Result<Vec<RunMount>, BuildError> {
        let working_dir = if stage.draft.config.working_dir.is_empty() { "/" } else { &stage.draft.config.working_dir };
        let read = |(_, text): &(String, String)| {
            let text = words::expand(text, self.plan.escape, &|name| Self::lookup(stage, name))?;
            parse(&text, working_dir).map_err(|why| format!("line {}: --mount={text}: {why}", instruction.line))
        };
        let mounts = instruction.flags.iter().filter(|(flag, _)| flag == "mount").map(read);
        mounts.collect::<Result<_, _>>().map_err(BuildError::Dockerfile)
    }

    /// Of what they show, all that the step's layer depends on.
    pub(super) async fn mounts_key(&self, mounts: &[RunMount]) -> Result<String, BuildError> {
        let mut parts = Vec::new();
        for mount in &self.with_bases(mounts).await? {
            parts.push(format!("{mount:?}"));
            let Kind::Bind { from, source, .. } = &mount.kind else { continue };
            let layers = match from.as_str() {
                "" => None,
                from => match self.origin(from).await? {
                    Origin::Layers(layers) => Some(layers),
                    Origin::Files(_) => None,
                },
            };
            parts.push(if let Some(layers) = layers {
                layers.join(" ")
            } else {
                let opened = self.open(from).await?;
                let mut hash = Sha256::new();
                let hashed = opened.sources(&self.plan.context).hash(&clean(source), &mut hash);
                hashed.map_err(|error| failed(mount, &error))?;
                hex::encode(hash.finalize())
            });
        }
        Ok(key(&parts.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    /// Has a command see its mounts.
    pub(super) async fn mount(&self, mounts: &[RunMount], config: &mut ContainerConfig) -> Result<Held, BuildError> {
        let mut held = Held::default();
        let mounts = self.with_bases(mounts).await?;
        self.lock_caches(&mounts, &mut held).await;
        for mount in &mounts {
            let target = mount.target.clone();
            let (source, read_only) = match &mount.kind {
                Kind::Bind { from, source, writable } => {
                    let copied = self.copy_for(from, source, &mut held).await;
                    (copied.map_err(|error| failed(mount, &error))?, !writable)
                }
                Kind::Cache { id, sharing, owner, mode, read_only, from, source } => {
                    let dir = self.cache(id, *sharing, &mut held);
                    let made = if from.is_empty() || dir.exists() {
                        make_cache(&dir, *owner, *mode)
                    } else {
                        self.begin_cache(&dir, from, source, &mut held).await
                    };
                    made.map_err(|error| failed(mount, &error))?;
                    (dir, *read_only)
                }
                Kind::Tmpfs { size_bytes } => {
                    let source = MountSource::Tmpfs { size_bytes: *size_bytes, mode: None, options: Vec::new() };
                    config.mounts.push(ContainerMount { source, target, read_only: false });
                    continue;
                }
                Kind::Secret { .. } => {
                    self.show_secret(mount, config).await?;
                    continue;
                }
                Kind::Ssh { .. } => match self.show_agent(mount, config, &mut held).await? {
                    Some(socket) => (socket, false),
                    None => continue,
                },
            };
            let path = self.plan.engine.view_for(config, &source)?.display().to_string();
            let source = MountSource::Bind { path, propagation: String::new(), alone: true, writable_below: false };
            config.mounts.push(ContainerMount { source, target, read_only });
        }
        Ok(held)
    }

    /// Copies what a bind shows: what the command writes there is nobody's.
    async fn copy_for(&self, from: &str, source: &str, held: &mut Held) -> io::Result<PathBuf> {
        let engine = &self.plan.engine;
        let dir = engine.image_store().incoming()?;
        held.copies.push(dir.clone());
        let opened = self.open(from).await.map_err(io::Error::other)?;
        let sources = opened.sources(&self.plan.context);
        let options = CopyOptions { keeps_owners: sources.has_owners(), ..CopyOptions::default() };
        tokio::task::block_in_place(|| {
            let paths = sources.find(source)?;
            stage::copy(sources, &paths, &dir, COPY, &options)
        })?;
        Ok(dir.join(COPY))
    }

    /// The same mounts, with caches that begin with something being other ones whenever that is something else.
    async fn with_bases(&self, mounts: &[RunMount]) -> Result<Vec<RunMount>, BuildError> {
        let mut mounts = mounts.to_vec();
        for mount in &mut mounts {
            let Kind::Cache { id, from, source, .. } = &mut mount.kind else { continue };
            if from.is_empty() {
                continue;
            }
            let base = match self.origin(from).await? {
                Origin::Layers(layers) => layers.join(" "),
                Origin::Files(_) => from.clone(),
            };
            *id = key(&[id, &base, source]);
        }
        Ok(mounts)
    }

    /// Makes a cache of what it begins with.
    async fn begin_cache(&self, dir: &Path, from: &str, source: &str, held: &mut Held) -> io::Result<()> {
        let copied = self.copy_for(from, source, held).await?;
        fs::create_dir_all(dir.parent().unwrap_or_else(|| Path::new("/")))?;
        match fs::rename(copied, dir) {
            // Another build was first.
            Err(_) if dir.exists() => Ok(()),
            renamed => renamed,
        }
    }

    /// Waits for turns at the caches that are to be had alone: each once, and in the same order as everybody, so that
    /// no two wait for each other.
    async fn lock_caches(&self, mounts: &[RunMount], held: &mut Held) {
        let locked = mounts.iter().filter_map(|mount| match &mount.kind {
            Kind::Cache { id, sharing: Sharing::Locked, .. } => Some(cache_name(id, 0)),
            _ => None,
        });
        for name in locked.collect::<BTreeSet<_>>() {
            held.turns.push(self.plan.engine.caches().take(&name).await);
        }
    }

    /// A cache's directory; of those that others use, another one if it is to be private.
    fn cache(&self, id: &str, sharing: Sharing, held: &mut Held) -> PathBuf {
        let engine = &self.plan.engine;
        let name = match sharing {
            Sharing::Shared | Sharing::Locked => cache_name(id, 0),
            Sharing::Private => {
                let free = |name: String| engine.caches().try_take(&name).map(|turn| (name, turn));
                let found = (0..).find_map(|number| free(cache_name(id, number)));
                let (name, turn) = found.expect("fewer builds run than there are numbers");
                held.turns.push(turn);
                name
            }
        };
        engine.image_store().cache_mounts().join(name)
    }

    /// Has an agent of the client's answer at a socket, if it lends one.
    async fn show_agent(
        &self,
        mount: &RunMount,
        config: &mut ContainerConfig,
        held: &mut Held,
    ) -> Result<Option<PathBuf>, BuildError> {
        let Kind::Ssh { id, required, owner: (uid, gid), mode } = &mount.kind else { return Ok(None) };
        let client = &self.plan.options.client;
        if !client.has_agent(id).await {
            return match required {
                false => Ok(None),
                true => Err(BuildError::Dockerfile(format!("SSH agent {id}: not found: give it by --ssh {id}"))),
            };
        }
        let mut opened = || {
            let dir = self.plan.engine.image_store().incoming()?;
            held.copies.push(dir.clone());
            // The path of a socket may be no longer than 107 bytes.
            let short = fs::File::open(&dir)?;
            let listener = UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", short.as_raw_fd()))?;
            let socket = dir.join(SOCKET);
            chown(&socket, Some(*uid), Some(*gid))?;
            fs::set_permissions(&socket, fs::Permissions::from_mode(*mode))?;
            Ok((listener, socket))
        };
        let (listener, socket) = opened().map_err(|error: io::Error| failed(mount, &error))?;
        let (client, id) = (client.clone(), id.clone());
        held.agents.push(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                if connections.len() >= CONNECTIONS_MAX {
                    connections.join_next().await;
                }
                let (client, id) = (client.clone(), id.clone());
                connections.spawn(async move { client.connect_agent(&id, connection).await });
            }
        })));
        if !config.env.iter().any(|var| var.starts_with("SSH_AUTH_SOCK=")) {
            config.env.push(format!("SSH_AUTH_SOCK={}", mount.target));
        }
        Ok(Some(socket))
    }

    async fn show_secret(&self, mount: &RunMount, config: &mut ContainerConfig) -> Result<(), BuildError> {
        let Kind::Secret { id, variable, required, owner: (uid, gid), mode } = &mount.kind else { return Ok(()) };
        let lent = self.plan.options.client.secret(id).await;
        let Some(secret) = lent.map_err(|why| BuildError::Dockerfile(format!("secret {id}: {why}")))? else {
            return match required {
                false => Ok(()),
                true => {
                    Err(BuildError::Dockerfile(format!("secret {id}: not found: give it by --secret id={id},src=FILE")))
                }
            };
        };
        if !variable.is_empty() {
            config.env.push(format!("{variable}={}", String::from_utf8_lossy(secret.expose())));
        }
        if !mount.target.is_empty() {
            let (target, bytes) = (mount.target.clone(), secret.clone());
            config.payloads.push(Payload { target, bytes, uid: *uid, gid: *gid, mode: *mode });
        }
        Ok(())
    }
}

/// What a cache's directory is called: the first, or another one for those who want it private.
fn cache_name(id: &str, number: u32) -> String {
    key(&[id, &number.to_string()])
}

fn failed(mount: &RunMount, error: &io::Error) -> BuildError {
    let source = match &mount.kind {
        Kind::Bind { from, source, .. } if !from.is_empty() => format!("{source} of {from} on "),
        Kind::Bind { source, .. } => format!("{source} of the context on "),
        _ => String::new(),
    };
    BuildError::Step { step: format!("mounting {source}{}", mount.target), reason: error.to_string() }
}

fn make_cache(dir: &Path, (uid, gid): (u32, u32), mode: u32) -> io::Result<()> {
    fs::create_dir_all(dir.parent().unwrap_or_else(|| Path::new("/")))?;
    match fs::DirBuilder::new().mode(mode).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| chown(dir, Some(uid), Some(gid))),
    }
}

/// Takes away what was made in a new layer only to mount something there: what is empty, and in no layer below.
pub(super) fn remove_mount_points(changed: &Path, layers: &[PathBuf], mounts: &[RunMount]) {
    for mount in mounts {
        let mut inside = clean(&mount.target);
        while !inside.as_os_str().is_empty() {
            let below = layers.iter().any(|layer| sys::open_in_root(layer, &inside).is_ok());
            // What cannot be removed has something in it, or is not there.
            if below || remove_empty(changed, &inside).is_err() {
                break;
            }
            inside.pop();
        }
    }
}

/// Removes a directory or file that is empty. Its directory is held open: whatever stands in its way leads nowhere else.
fn remove_empty(root: &Path, inside: &Path) -> io::Result<()> {
    let (Some(dir), Some(name)) = (inside.parent(), inside.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = sys::open_in_root(root, dir)?;
    let at = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    let meta = fs::symlink_metadata(&at)?;
    match (meta.is_dir(), meta.is_file() && meta.len() == 0) {
        (true, _) => fs::remove_dir(&at),
        (_, true) => fs::remove_file(&at),
        _ => Err(io::ErrorKind::DirectoryNotEmpty.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_what_is_usual() {
        let read = |text: &str| parse(text, "/work").unwrap();
        let bind = |source: &str, writable| Kind::Bind { from: String::new(), source: source.into(), writable };
        assert_eq!(read("target=src"), RunMount { target: "/work/src".into(), kind: bind("/", false) });
        assert_eq!(read("type=bind,src=a,dst=/b,rw").kind, bind("a", true));
        let Kind::Cache { id, sharing, mode, .. } = read("type=cache,target=/c,sharing=locked,mode=0700").kind else {
            panic!("it is no cache")
        };
        assert_eq!((id.as_str(), sharing, mode), ("/c", Sharing::Locked, 0o700));
        assert_eq!(read("type=tmpfs,target=/t,size=1k").kind, Kind::Tmpfs { size_bytes: Some(1024) });
        assert_eq!(read("type=secret,id=s").target, "/run/secrets/s");
        assert_eq!(read("type=secret,id=s,env=S").target, "");
        assert_eq!(read("type=ssh").target, "/run/buildkit/ssh_agent.default");
        let Kind::Ssh { id, mode, .. } = read("type=ssh,id=k,mode=0666").kind else { panic!("it is no agent") };
        assert_eq!((id.as_str(), mode), ("k", 0o666));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, want) in [
            ("type=bind", "needs a target"),
            ("type=volume,target=/v", "unsupported mount type"),
            ("type=cache,target=/c,sharing=mine", "sharing=\"mine\""),
            ("type=cache,target=/c,colour=red", "unexpected key 'colour'"),
            ("type=cache,target=/c,mode=rwx", "mode=\"rwx\""),
            ("type=tmpfs,target=/t,size=big", "size"),
            ("type=secret", "needs an id"),
            ("type=ssh,required=perhaps", "required=\"perhaps\""),
            ("target=/t,rw=maybe", "rw=\"maybe\""),
        ] {
            let why = parse(text, "/").unwrap_err();
            assert!(why.contains(want), "{text}: {why}");
        }
    }

    #[test]
    fn only_what_was_made_for_a_mount_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let (changed, layer, outside) = (dir.path().join("changed"), dir.path().join("layer"), dir.path().join("host"));
        for made in ["changed/made/deep", "changed/kept", "changed/full/deep", "layer/kept", "host/empty"] {
            fs::create_dir_all(dir.path().join(made)).unwrap();
        }
        fs::write(changed.join("full/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, changed.join("link")).unwrap();
        let mount = |target: &str| RunMount { target: target.into(), kind: Kind::Tmpfs { size_bytes: None } };
        let mounts = ["/made/deep", "/kept", "/full/deep", "/link/empty"].map(mount);
        remove_mount_points(&changed, &[layer], &mounts);
        assert!(!changed.join("made").exists() && !changed.join("full/deep").exists());
        assert!(changed.join("kept").exists() && changed.join("full/file").exists());
        assert!(outside.join("empty").exists(), "a link led out");
    }
}
