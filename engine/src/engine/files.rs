//! The files of containers: copied in and out, compared with their image, kept as a new one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use skep_api::Timestamp;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

use super::launch::make_working_dir;
use super::{Container, Engine, EngineError, disk_error, now};
use crate::build::instruction;
use crate::container::archive::{KEEP_KINDS, NOT_A_DIRECTORY, NOT_FOUND};
use crate::container::config::{ContainerConfig, MountSource};
use crate::container::id_map::Shift;
use crate::container::state::ContainerState;
use crate::container::{targets, user};
use crate::image::store::{ConfigBlob, HistoryEntry, Image, ImageConfig};
use crate::image::{Platform, layer, normalize};
use crate::sys;

/// What is known of a file without reading it.
#[derive(Clone, Debug)]
pub struct PathStat {
    pub name: String,
    pub size_bytes: u64,
    /// As `stat` has it.
    pub mode: u32,
    pub modified: Timestamp,
    /// Where a link leads; empty: it is none.
    pub link_target: String,
}

impl PathStat {
    fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// How a container's file differs from its image's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Modified,
    Added,
    Deleted,
}

/// How an archive is unpacked in a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writing {
    /// Whether a directory is never replaced by what is none, nor the other way round.
    pub keeps_kinds: bool,
    /// Whether files are the container's user's, if it has another than root; otherwise whose the archive says.
    pub as_user: bool,
}

/// What a container is kept as.
#[derive(Clone, Debug, Default)]
pub struct CommitOptions {
    /// The image's name; empty: none.
    pub name: String,
    pub comment: String,
    pub author: String,
    /// Instructions as a Dockerfile has them.
    pub changes: Vec<String>,
    /// What its configuration is overridden with, as the Engine API has it.
    pub config: Option<ImageConfig>,
}

const ERROR_LEN_MAX: u64 = 4096;

/// A container's file system, mounted as long as this is there.
pub(super) struct Mounted {
    container: Arc<Container>,
    /// Whether it is only mounted for this.
    ours: bool,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = self.container.dirs.unmount()
        {
            tracing::warn!(container = %self.container.id, %error, "a container's files were not unmounted");
        }
    }
}

/// A container's files, for as long as this is there.
struct Files {
    container: Arc<Container>,
    root: fs::File,
    // Taken down before another may mount it.
    _mounted: Mounted,
    _one: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Files {
    fn lacks(&self, path: &str) -> EngineError {
        EngineError::NoFile { path: path.to_owned(), container: self.container.id.clone() }
    }

    /// The container's root, for this process and its helpers, wherever it is mounted by now.
    fn root(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.root.as_raw_fd()).into()
    }
}

/// Where a path of a container lies on this host.
struct Place {
    root: PathBuf,
    inside: PathBuf,
    /// As the container has it.
    whole: PathBuf,
    read_only: bool,
    is_rootfs: bool,
}

/// A helper that reads or writes an archive, with what it needs as long as it runs.
pub struct Archiving {
    pub child: Child,
    files: Files,
    path: String,
}

impl std::fmt::Debug for Archiving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Archiving").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Archiving {
    /// Waits for the helper's end, after its streams are done.
    pub async fn finish(mut self) -> Result<(), EngineError> {
        let mut said = String::new();
        if let Some(stderr) = self.child.stderr.take() {
            // It is told beside the exit code, if it can be had.
            let _ = stderr.take(ERROR_LEN_MAX).read_to_string(&mut said).await;
        }
        let status = self.child.wait().await.map_err(disk_error("copying files"))?;
        let path = &self.path;
        match status.code() {
            Some(0) => Ok(()),
            Some(NOT_FOUND) => Err(self.files.lacks(path)),
            Some(NOT_A_DIRECTORY) => {
                Err(EngineError::Invalid(format!("{path} is not a directory: extraction point is not a directory")))
            }
            _ => Err(EngineError::Invalid(format!("files at {path} could not be copied: {}", said.trim()))),
        }
    }
}

/// Whether the directory that the first process is to begin in is one of those that are mounted, or in one.
fn covers_working_dir(config: &ContainerConfig) -> bool {
    config.mounts.iter().any(|mount| Path::new(&config.working_dir).starts_with(&mount.target))
}

impl Engine {
    /// Mounts a container's file system unless it is; only while nobody starts or removes it.
    pub(super) fn mounted(&self, container: &Arc<Container>) -> Result<Mounted, EngineError> {
        let ours = container.require_running().is_err();
        if ours {
            self.put_shift_in_force(container).map_err(disk_error("mapping owners of files"))?;
            let doing = format!("mounting the files of container {}", container.id);
            let mounted = self.layer_dirs(&container.layers).and_then(|layers| container.dirs.mount_root(&layers));
            let mounted = mounted.and_then(|()| self.show_images(container));
            let config = container.config();
            let made = mounted.and_then(|()| match &*container.state.borrow() {
                // As it will find it when it starts.
                ContainerState::Created if !covers_working_dir(&config) => {
                    let root = container.dirs.rootfs();
                    container.dirs.as_root(|| make_working_dir(&config, &root, &BTreeMap::new()))
                }
                _ => Ok(()),
            });
            made.map_err(disk_error(doing))?;
        }
        Ok(Mounted { container: container.clone(), ours })
    }

    /// Where `path` lies: what is mounted is a root of its own.
    fn place(&self, files: &Files, path: &str) -> Place {
        let container = &files.container;
        let led = |path: &Path| targets::resolved(&files.root(), path);
        let named = Path::new("/").join(crate::build::clean(path));
        let whole = match (named.parent(), named.file_name()) {
            // A link at the end is meant itself, unless what is in the directory that it leads to is.
            (Some(parent), Some(name)) if !path.ends_with('/') && !path.ends_with("/.") => led(parent).join(name),
            _ => led(&named),
        };
        let config = container.config();
        let etc = container.dirs.shown_etc(false).into_iter().find(|file| Path::new(&file.target) == whole);
        let is_covered = config.mounts.iter().any(|mount| Path::new(&mount.target) == whole);
        if let Some(file) = etc.filter(|file| file.source.is_file() && !is_covered) {
            let inside = Path::new("/").join(file.source.file_name().unwrap_or_default());
            let root = container.dirs.view(&container.dirs.data);
            return Place { root, inside, whole, read_only: config.read_only, is_rootfs: false };
        }
        let (rootfs, inside) = (files.root(), whole.clone());
        let mut best =
            (0, Place { root: rootfs, inside, whole: whole.clone(), read_only: config.read_only, is_rootfs: true });
        for (number, mount) in config.mounts.iter().enumerate() {
            let (source, below) = match &mount.source {
                MountSource::Volume { name, subpath, .. } => (
                    container.dirs.view(&self.volumes.data_dir(name)),
                    Path::new("/").join(crate::build::clean(subpath)),
                ),
                MountSource::Bind { path, .. } => (path.into(), PathBuf::from("/")),
                MountSource::Image { subpath, .. } => {
                    let dirs = container.dirs.of_mount(number);
                    (dirs.rootfs(), Path::new("/").join(crate::build::clean(subpath)))
                }
                MountSource::Tmpfs { .. } => continue,
            };
            let target = led(Path::new(&mount.target));
            let depth = target.components().count();
            if let Ok(rest) = whole.strip_prefix(&target)
                && depth > best.0
                && source.is_dir()
            {
                let place = Place {
                    root: source,
                    inside: below.join(rest),
                    whole: whole.clone(),
                    read_only: mount.read_only,
                    is_rootfs: false,
                };
                best = (depth, place);
            }
        }
        best.1
    }

    /// Has a container's files where they can be read and written, also if it starts or ends meanwhile.
    async fn archiving(&self, name: &str, path: &str) -> Result<Files, EngineError> {
        let container = self.find(name)?;
        if path.is_empty() {
            return Err(EngineError::Invalid("no path is given: name one in the container".into()));
        }
        let open = || {
            let doing = format!("opening the files of container {}", container.id);
            fs::File::open(container.dirs.rootfs()).map_err(disk_error(doing))
        };
        if container.require_running().is_ok() {
            let root = open();
            // What is open stays, also when the container's end takes the mount down.
            if !container.ended.load(Ordering::SeqCst) {
                let mounted = Mounted { container: container.clone(), ours: false };
                return Ok(Files { container, root: root?, _mounted: mounted, _one: None });
            }
            let mut state = container.state.subscribe();
            // It is dropped with the container, which is held here.
            drop(state.wait_for(|state| !matches!(state, ContainerState::Running(_))).await);
        }
        // One that does not run must not start while its files are mounted for this.
        let one = container.operation.clone().lock_owned().await;
        let mounted = self.mounted(&container)?;
        let root = open()?;
        Ok(Files { container, root, _mounted: mounted, _one: Some(one) })
    }

    /// What is at a path of a container.
    pub async fn stat_path(&self, name: &str, path: &str) -> Result<PathStat, EngineError> {
        let files = self.archiving(name, path).await?;
        let Place { root, inside, is_rootfs, whole, .. } = self.place(&files, path);
        let mut found = stat(&root, &inside).map_err(|_| files.lacks(path))?;
        if !found.link_target.is_empty() {
            let beside = whole.parent().unwrap_or_else(|| Path::new("/")).join(&found.link_target);
            let led = Path::new("/").join(crate::build::clean(&beside.to_string_lossy()));
            let led = if is_rootfs { targets::resolved(&root, &led) } else { led };
            found.link_target = led.display().to_string();
        }
        Ok(found)
    }

    /// Reads what is at a path of a container as an archive: the helper's output.
    pub async fn read_archive(&self, name: &str, path: &str) -> Result<Archiving, EngineError> {
        let files = self.archiving(name, path).await?;
        let Place { root, inside, .. } = self.place(&files, path);
        let found = stat(&root, &inside).map_err(|_| files.lacks(path))?;
        if path.ends_with('/') && found.is_file() {
            return Err(EngineError::Invalid(format!("{path}: not a directory: leave the slash at its end out")));
        }
        let last =
            if path.ends_with("/.") { "." } else { path.trim_end_matches('/').rsplit('/').next().unwrap_or("/") };
        let last = if last.is_empty() { "." } else { last };
        let child = self
            .archiver("archive-out", &files.container, &root, &inside)
            .arg(last)
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn();
        let child = child.map_err(disk_error("starting the archiver"))?;
        self.tell_container(&files.container, "archive-path", &[("path", path.to_owned())]);
        Ok(Archiving { child, files, path: path.to_owned() })
    }

    /// Unpacks an archive into a directory of a container: the helper's input.
    pub async fn write_archive(&self, name: &str, path: &str, how: Writing) -> Result<Archiving, EngineError> {
        let files = self.archiving(name, path).await?;
        let Place { root, inside, read_only, is_rootfs, .. } = self.place(&files, &format!("{path}/"));
        if read_only {
            return Err(EngineError::Forbidden(if is_rootfs {
                "container rootfs is marked read-only: copy to a volume".into()
            } else {
                format!("mounted volume is marked read-only: copy to another place than {path}")
            }));
        }
        let config = files.container.config();
        let owner = if how.as_user && !config.user.is_empty() {
            let user = user::resolve(&files.root(), &config.user, &[]);
            let user = user.map_err(|error| EngineError::Invalid(error.to_string()))?;
            format!("{}:{}", user.uid, user.gid)
        } else {
            String::new()
        };
        let child = self
            .archiver("archive-in", &files.container, &root, &inside)
            .arg(if how.keeps_kinds { KEEP_KINDS } else { "" })
            .arg(owner)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let child = child.map_err(disk_error("starting the archiver"))?;
        self.tell_container(&files.container, "extract-to-dir", &[("path", path.to_owned())]);
        Ok(Archiving { child, files, path: path.to_owned() })
    }

    /// Reads all of a container's file system as an archive: the helper's output.
    pub async fn export(&self, name: &str) -> Result<Archiving, EngineError> {
        let files = self.archiving(name, "/").await?;
        let root = files.root();
        let child = self
            .archiver("archive-out", &files.container, &root, Path::new("/"))
            .arg("")
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn();
        let child = child.map_err(disk_error("starting the archiver"))?;
        self.tell_container(&files.container, "export", &[]);
        Ok(Archiving { child, files, path: "/".into() })
    }

    fn archiver(&self, command: &str, container: &Container, root: &Path, inside: &Path) -> Command {
        let mut archiver = self.helper.command();
        let owner = container.dirs.shift.as_ref().map(Shift::user_namespace).unwrap_or_default();
        archiver
            .arg(command)
            .arg(owner)
            .arg(root)
            .arg(inside)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .current_dir("/");
        archiver
    }

    /// How a container's files differ from its image's, by path.
    pub fn changes(&self, name: &str) -> Result<Vec<(String, Change)>, EngineError> {
        let container = self.find(name)?;
        let mut changes = Vec::new();
        let compared = self
            .layer_dirs(&container.layers)
            .and_then(|layers| changes_below(&container.dirs.changed()?, &layers, Path::new(""), &mut changes));
        compared.map_err(disk_error(format!("comparing the files of container {}", container.id)))?;
        changes.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(changes)
    }

    /// Holds a container's processes; says whether there were any left.
    fn try_hold(&self, container: &Container) -> Result<bool, EngineError> {
        let held = self.pause(&container.id, true);
        // It may end at this very moment.
        if held.is_err() && !container.is_alive() { Ok(false) } else { held.map(|()| true) }
    }

    fn let_go(&self, container: &Container) -> Result<(), EngineError> {
        let let_go = self.pause(&container.id, false);
        // What has ended meanwhile has nothing left to be let go of.
        if container.is_alive() { let_go } else { Ok(()) }
    }

    /// Keeps a container as an image. Its processes are held meanwhile: one that changed its files as
    /// they are read could make us follow a link of its own out of its root.
    pub async fn commit(&self, name: &str, options: CommitOptions) -> Result<Image, EngineError> {
        let container = self.find(name)?;
        let config = container.config();
        let full = match options.name.as_str() {
            "" => None,
            name => Some(
                normalize(name).ok_or_else(|| EngineError::Invalid(format!("invalid reference format: {name:?}")))?,
            ),
        };
        let base = self.images.find(&config.image_id);
        let mut image_config = ImageConfig {
            user: config.user.clone(),
            env: config.env.iter().filter(|var| var.contains('=')).cloned().collect(),
            entrypoint: config.entrypoint.clone(),
            cmd: config.args.clone(),
            working_dir: config.working_dir.clone(),
            labels: config.labels.clone(),
            stop_signal: config.stop_signal.clone(),
            exposed_ports: config.exposed_ports.iter().map(|port| (port.clone(), serde_json::json!({}))).collect(),
            ..base.as_ref().map(|image| image.config.clone()).unwrap_or_default()
        };
        if let Some(own) = options.config {
            overlay_config(&mut image_config, own);
        }
        let image_config = instruction::apply_changes(image_config, &options.changes).map_err(EngineError::Invalid)?;
        let holds = container.require_running().is_ok() && !container.is_paused();
        let holds = holds && self.try_hold(&container)?;
        let (store, dirs) = (self.images.clone(), container.dirs.clone());
        let sealed = tokio::task::spawn_blocking(move || layer::seal_copy(&store, &dirs.changed()?)).await;
        if holds {
            self.let_go(&container)?;
        }
        let doing = || disk_error(format!("keeping container {} as an image", container.id));
        let diff_id = sealed.map_err(io::Error::other).flatten().map_err(doing())?;
        let before = base.as_ref().and_then(|image| self.images.config_blob(&image.id).ok());
        let mut blob = before.and_then(|raw| serde_json::from_slice::<ConfigBlob>(&raw).ok()).unwrap_or_default();
        let created = now().to_string();
        blob.history.push(HistoryEntry {
            created: Some(created.clone()),
            created_by: config.command().join(" "),
            author: options.author.clone(),
            comment: options.comment.clone(),
            empty_layer: false,
        });
        let blob = ConfigBlob {
            created: Some(created),
            config: Some(image_config),
            rootfs: crate::image::store::RootFs {
                kind: "layers".into(),
                diff_ids: container.layers.iter().cloned().chain([diff_id]).collect(),
            },
            author: options.author,
            comment: options.comment,
            history: blob.history,
            ..ConfigBlob::of(base.map_or_else(Platform::own, |image| image.platform()))
        };
        let raw = serde_json::to_vec(&blob).map_err(|error| doing()(error.into()))?;
        let image = self.images.keep_config(&raw, full.into_iter().collect(), BTreeSet::new()).map_err(doing())?;
        self.tell_container(&container, "commit", &[("imageID", image.id.clone())]);
        Ok(image)
    }
}

/// Puts what `own` says over a configuration.
fn overlay_config(config: &mut ImageConfig, own: ImageConfig) {
    for (field, from) in [
        (&mut config.user, own.user),
        (&mut config.working_dir, own.working_dir),
        (&mut config.stop_signal, own.stop_signal),
    ] {
        if !from.is_empty() {
            *field = from;
        }
    }
    for (field, from) in [(&mut config.cmd, own.cmd), (&mut config.entrypoint, own.entrypoint)] {
        if !from.is_empty() {
            *field = from;
        }
    }
    for var in own.env {
        if let Some((key, value)) = var.split_once('=') {
            instruction::set_env(&mut config.env, key, value);
        }
    }
    config.labels.extend(own.labels);
    config.exposed_ports.extend(own.exposed_ports);
    config.volumes.extend(own.volumes);
    config.healthcheck = own.healthcheck.or_else(|| config.healthcheck.take());
}

/// Looks at a path within a root; a link at its end is not followed.
fn stat(root: &Path, inside: &Path) -> io::Result<PathStat> {
    let relative = inside.strip_prefix("/").unwrap_or(inside);
    let (meta, name, link_target) = match relative.file_name() {
        None => (fs::metadata(root)?, "/".to_owned(), String::new()),
        Some(name) => {
            let parent = sys::open_in_root(
                root,
                relative.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new(".")),
            )?;
            let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
            let meta = fs::symlink_metadata(&path)?;
            let target = if meta.is_symlink() { fs::read_link(&path)?.display().to_string() } else { String::new() };
            (meta, name.to_string_lossy().into_owned(), target)
        }
    };
    Ok(PathStat {
        name,
        size_bytes: meta.len(),
        mode: meta.mode(),
        modified: Timestamp::from_nanos(meta.mtime() * 1_000_000_000 + meta.mtime_nsec()),
        link_target,
    })
}

fn changes_below(upper: &Path, layers: &[PathBuf], path: &Path, changes: &mut Vec<(String, Change)>) -> io::Result<()> {
    let entries = match fs::read_dir(upper.join(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let below = path.join(entry.file_name());
        let meta = entry.metadata()?;
        // The topmost layer that says something of it.
        let lower = layers.iter().rev().find_map(|layer| fs::symlink_metadata(layer.join(&below)).ok());
        let was_there = lower.as_ref().is_some_and(|meta| !(meta.file_type().is_char_device() && meta.rdev() == 0));
        let change = if meta.file_type().is_char_device() && meta.rdev() == 0 {
            Change::Deleted
        } else if was_there {
            Change::Modified
        } else {
            Change::Added
        };
        changes.push((format!("/{}", below.display()), change));
        if meta.is_dir() {
            changes_below(upper, layers, &below, changes)?;
        }
    }
    Ok(())
}
