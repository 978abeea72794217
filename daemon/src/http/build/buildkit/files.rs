//! Files that come from a client: the directories that it shows to builds.
//!
//! The client lists what it has, in the order of paths; each file's place in the list is its number. Content comes for
//! the numbers that are asked for: those of files that are not here already, from another time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use skep_api::buildkit::session::file_sync_client::FileSyncClient;
use skep_api::buildkit::session::packet::Type;
use skep_api::buildkit::session::{Packet, Stat};
use skep_api::with_causes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap};

use super::session::Session;

/// Files whose content is under way at a time.
const ASKED_MAX: usize = 64;
/// Packets that wait to be written to disk, of some 32 KiB each.
const PACKETS_AHEAD: usize = 64;

/// Go's bits for what is no file, and for those that POSIX has elsewhere.
const DIRECTORY: u32 = 1 << 31;
const SYMLINK: u32 = 1 << 27;
const OTHER_KINDS: u32 = 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19;
const SPECIAL: [(u32, u32); 3] = [(1 << 23, 0o4000), (1 << 22, 0o2000), (1 << 20, 0o1000)];

/// What is wanted of a client's directory.
#[derive(Default)]
pub(super) struct Wanted<'a> {
    /// What the client calls it.
    pub(super) dir: &'a str,
    /// These paths alone, and what links there lead to; all if there are none.
    pub(super) paths: Vec<String>,
    /// Patterns as in `.dockerignore`.
    pub(super) excluded: Vec<String>,
}

/// Fetches files of a client's directory; `bytes` counts what has come.
pub(super) async fn receive(
    session: &Session,
    wanted: Wanted<'_>,
    into: &Path,
    bytes: Arc<AtomicU64>,
) -> Result<(), Status> {
    let (asking, asked) = mpsc::channel(ASKED_MAX * 2);
    let mut request = tonic::Request::new(ReceiverStream::new(asked));
    let header = request.metadata_mut();
    put(header, "dir-name", &[wanted.dir.to_owned()])?;
    put(header, "followpaths", &wanted.paths)?;
    put(header, "exclude-patterns", &wanted.excluded)?;
    let (channel, origin) = session.channel();
    let mut client = FileSyncClient::with_origin(channel, origin).max_decoding_message_size(MESSAGE_LEN_MAX);
    let mut packets = client.diff_copy(request).await?.into_inner();
    let (coming, mut arrived) = mpsc::channel::<Packet>(PACKETS_AHEAD);
    let mut receiver = Receiver::new(into.to_owned(), asking);
    let writing = tokio::task::spawn_blocking(move || {
        while let Some(packet) = arrived.blocking_recv() {
            receiver.take(packet)?;
        }
        receiver.finish()
    });
    while let Some(packet) = packets.message().await? {
        bytes.fetch_add(packet.data.len() as u64, Ordering::Relaxed);
        // The writer says why it takes no more.
        if coming.send(packet).await.is_err() {
            break;
        }
    }
    drop(coming);
    let written = writing.await.map_err(|error| Status::internal(error.to_string()))?;
    written.map_err(|error| Status::internal(format!("files of {}: {}", wanted.dir, with_causes(&error))))
}

const MESSAGE_LEN_MAX: usize = 16 << 20;

/// Puts values into a call's header; where they are not all plain ASCII, in the encoding of URLs.
fn put(header: &mut MetadataMap, key: &'static str, values: &[String]) -> Result<(), Status> {
    let is_plain = |value: &String| value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    let plain = values.iter().all(is_plain);
    for value in values {
        let text = if plain { value.clone() } else { skep_api::escape(value) };
        let value = AsciiMetadataValue::try_from(text).map_err(|error| Status::internal(error.to_string()))?;
        header.append(AsciiMetadataKey::from_static(key), value);
    }
    if !plain {
        let key = AsciiMetadataKey::from_bytes(format!("{key}-encoded").as_bytes());
        header.insert(key.map_err(|error| Status::internal(error.to_string()))?, AsciiMetadataValue::from_static("1"));
    }
    Ok(())
}

/// Writes what comes.
struct Receiver {
    root: PathBuf,
    asking: mpsc::Sender<Packet>,
    /// Entries listed so far.
    listed: u32,
    list_is_whole: bool,
    /// Directories made here: nothing is written but into these, so that no link leads elsewhere.
    dirs: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    /// All that was listed.
    seen: BTreeSet<PathBuf>,
    /// To be asked for.
    waiting: VecDeque<(u32, PathBuf, Stat)>,
    /// Asked for.
    open: BTreeMap<u32, (fs::File, Stat)>,
    is_done: bool,
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Receiver {
    fn new(root: PathBuf, asking: mpsc::Sender<Packet>) -> Self {
        Self {
            root,
            asking,
            listed: 0,
            list_is_whole: false,
            dirs: BTreeSet::from([PathBuf::new()]),
            files: BTreeSet::new(),
            seen: BTreeSet::new(),
            waiting: VecDeque::new(),
            open: BTreeMap::new(),
            is_done: false,
        }
    }

    fn take(&mut self, packet: Packet) -> io::Result<()> {
        match packet.r#type() {
            Type::Stat => match packet.stat {
                Some(stat) => self.list(stat)?,
                None => self.list_is_whole = true,
            },
            Type::Data => self.write(packet.id, &packet.data)?,
            Type::Fin => return Ok(()),
            Type::Err => return Err(wrong(String::from_utf8_lossy(&packet.data).into_owned())),
            Type::Req => return Err(wrong("the client asked for a file of ours")),
        }
        self.ask()
    }

    fn list(&mut self, stat: Stat) -> io::Result<()> {
        let number = self.listed;
        self.listed += 1;
        let path = PathBuf::from(&stat.path);
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        let parent = path.parent().unwrap_or_else(|| Path::new(""));
        if !plain || path.as_os_str().is_empty() || !self.dirs.contains(parent) {
            return Err(wrong(format!("{:?} lies in no directory that came before", stat.path)));
        }
        if !self.seen.insert(path.clone()) {
            return Err(wrong(format!("{:?} is listed twice", stat.path)));
        }
        let target = self.root.join(&path);
        let before = fs::symlink_metadata(&target).ok();
        if stat.mode & DIRECTORY != 0 {
            if !before.is_some_and(|meta| meta.is_dir()) {
                remove(&target)?;
                fs::create_dir(&target)?;
            }
            fs::set_permissions(&target, fs::Permissions::from_mode(posix_mode(stat.mode)))?;
            self.dirs.insert(path);
        } else if stat.mode & SYMLINK != 0 {
            remove(&target)?;
            symlink(&stat.link, &target)?;
        } else if stat.mode & OTHER_KINDS != 0 {
            // Nothing that a build could copy.
            remove(&target)?;
        } else if stat.link.is_empty() {
            if !before.is_some_and(|meta| is_same(&meta, &stat)) {
                remove(&target)?;
                fs::File::create_new(&target)?;
                self.waiting.push_back((number, target, stat));
            }
            self.files.insert(path);
        } else {
            let linked = PathBuf::from(&stat.link);
            if !self.files.contains(&linked) {
                return Err(wrong(format!("{:?} is linked to {:?}, which did not come before", stat.path, stat.link)));
            }
            remove(&target)?;
            fs::hard_link(self.root.join(linked), &target)?;
            self.files.insert(path);
        }
        Ok(())
    }

    fn write(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        let (file, stat) = self.open.get_mut(&number).ok_or_else(|| wrong("content came that nobody asked for"))?;
        if !data.is_empty() {
            return file.write_all(data);
        }
        file.set_permissions(fs::Permissions::from_mode(posix_mode(stat.mode)))?;
        file.set_modified(modified(stat))?;
        self.open.remove(&number);
        Ok(())
    }

    /// Asks for what is next, or says that there is nothing more.
    fn ask(&mut self) -> io::Result<()> {
        while self.open.len() < ASKED_MAX
            && let Some((number, path, stat)) = self.waiting.pop_front()
        {
            self.open.insert(number, (fs::File::options().write(true).open(path)?, stat));
            self.send(Packet { r#type: Type::Req.into(), id: number, ..Packet::default() })?;
        }
        if self.list_is_whole && self.open.is_empty() && !self.is_done {
            self.is_done = true;
            self.send(Packet { r#type: Type::Fin.into(), ..Packet::default() })?;
        }
        Ok(())
    }

    fn send(&self, packet: Packet) -> io::Result<()> {
        self.asking.blocking_send(packet).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Takes away what is there from another time and was not listed.
    fn finish(&self) -> io::Result<()> {
        if !self.is_done {
            return Err(wrong("the client broke off"));
        }
        for dir in &self.dirs {
            for entry in fs::read_dir(self.root.join(dir))? {
                let name = entry?.file_name();
                if !self.seen.contains(&dir.join(&name)) {
                    remove(&self.root.join(dir).join(name))?;
                }
            }
        }
        Ok(())
    }
}

/// Whether a file is the one that is listed, as far as can be told without its content.
fn is_same(meta: &fs::Metadata, stat: &Stat) -> bool {
    meta.is_file()
        && i64::try_from(meta.len()) == Ok(stat.size)
        && meta.permissions().mode() & 0o7777 == posix_mode(stat.mode)
        && meta.modified().is_ok_and(|time| time == modified(stat))
}

fn modified(stat: &Stat) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(stat.modified).unwrap_or(0))
}

/// Removes what is at a path, if anything is.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn posix_mode(mode: u32) -> u32 {
    let special = SPECIAL.iter().filter(|(go, _)| mode & go != 0).map(|(_, posix)| posix);
    special.fold(mode & 0o777, |mode, bit| mode | bit)
}

/// A file's mode as Go has it; none if it is no file, directory or link.
pub(super) fn go_mode(meta: &fs::Metadata) -> Option<u32> {
    let mode = meta.permissions().mode();
    let kind = match (meta.is_file(), meta.is_dir(), meta.is_symlink()) {
        (true, ..) => 0,
        (_, true, _) => DIRECTORY,
        (.., true) => SYMLINK,
        _ => return None,
    };
    let special = SPECIAL.iter().filter(|(_, posix)| mode & posix != 0).map(|(go, _)| go);
    Some(special.fold(kind | mode & 0o777, |mode, bit| mode | bit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(path: &str, mode: u32, link: &str) -> Packet {
        let stat = Stat { path: path.into(), mode, link: link.into(), modified: 1_000_000_000, ..Stat::default() };
        Packet { stat: Some(stat), ..Packet::default() }
    }

    fn data(id: u32, text: &str) -> Packet {
        Packet { r#type: Type::Data.into(), id, data: text.into(), ..Packet::default() }
    }

    fn received(packets: Vec<Packet>, into: &Path) -> (io::Result<()>, Vec<(Type, u32)>) {
        let (asking, mut asked) = mpsc::channel(100);
        let mut receiver = Receiver::new(into.to_owned(), asking);
        let taken = packets.into_iter().try_for_each(|packet| receiver.take(packet)).and_then(|()| receiver.finish());
        drop(receiver);
        let mut told = Vec::new();
        while let Ok(packet) = asked.try_recv() {
            told.push((packet.r#type(), packet.id));
        }
        (taken, told)
    }

    #[test]
    fn files_come_as_they_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let packets = vec![
            stat("d", DIRECTORY | 0o750, ""),
            stat("d/f", 0o640 | 1 << 23, ""),
            stat("d/g", 0o640, "d/f"),
            stat("l", SYMLINK | 0o777, "/etc/passwd"),
            stat("p", 1 << 25 | 0o600, ""),
            Packet::default(),
            data(1, "hal"),
            data(1, "lo"),
            data(1, ""),
        ];
        let (taken, told) = received(packets, dir.path());
        taken.unwrap();
        assert_eq!(told, [(Type::Req, 1), (Type::Fin, 0)]);
        assert_eq!(fs::read_to_string(dir.path().join("d/g")).unwrap(), "hallo");
        let meta = fs::metadata(dir.path().join("d/f")).unwrap();
        assert_eq!(meta.permissions().mode() & 0o7777, 0o4640);
        assert_eq!(meta.modified().unwrap(), SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        assert_eq!(fs::read_link(dir.path().join("l")).unwrap(), Path::new("/etc/passwd"));
        assert!(!dir.path().join("p").exists());
    }

    #[test]
    fn what_is_here_from_another_time_does_not_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let sized = |path: &str, size: i64| {
            let mut packet = stat(path, 0o644, "");
            packet.stat.as_mut().unwrap().size = size;
            packet
        };
        let first = vec![
            stat("d", DIRECTORY | 0o755, ""),
            sized("d/f", 3),
            stat("e", DIRECTORY | 0o755, ""),
            stat("g", SYMLINK | 0o777, "/etc"),
            sized("h", 3),
            sized("i", 3),
            Packet::default(),
            data(1, "one"),
            data(1, ""),
            data(4, "two"),
            data(4, ""),
            data(5, "six"),
            data(5, ""),
        ];
        received(first, dir.path()).0.unwrap();
        // One is the same, one has grown; a directory is a file now, a link a directory, and one file is gone.
        let second = vec![
            stat("d", DIRECTORY | 0o755, ""),
            sized("d/f", 3),
            sized("e", 0),
            stat("g", DIRECTORY | 0o755, ""),
            sized("g/x", 1),
            sized("h", 4),
            Packet::default(),
            data(2, ""),
            data(4, "x"),
            data(4, ""),
            data(5, "four"),
            data(5, ""),
        ];
        let (taken, told) = received(second, dir.path());
        taken.unwrap();
        assert_eq!(told, [(Type::Req, 2), (Type::Req, 4), (Type::Req, 5), (Type::Fin, 0)]);
        for (path, want) in [("d/f", "one"), ("e", ""), ("g/x", "x"), ("h", "four")] {
            assert_eq!(fs::read_to_string(dir.path().join(path)).unwrap(), want, "{path}");
        }
        assert!(!dir.path().join("i").exists());
        assert!(!Path::new("/etc/x").exists());
    }

    #[test]
    fn nothing_lands_elsewhere() {
        for packets in [
            vec![stat("../f", 0o600, "")],
            vec![stat("/f", 0o600, "")],
            vec![stat("", 0o600, "")],
            vec![stat("d/f", 0o600, "")],
            vec![stat("l", SYMLINK, "/"), stat("l/f", 0o600, "")],
            vec![stat("l", SYMLINK, "/etc/passwd"), stat("l", 0o600, "")],
            vec![stat("h", 0o600, "../outside")],
            vec![stat("h", 0o600, "/etc/passwd")],
            vec![stat("f", 0o600, ""), stat("f", DIRECTORY, "")],
            vec![data(7, "x")],
            vec![Packet { r#type: Type::Err.into(), data: "no".into(), ..Packet::default() }],
            // The list does not end.
            vec![stat("f", 0o600, ""), data(0, "")],
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("in")).unwrap();
            fs::write(dir.path().join("outside"), "").unwrap();
            let what = format!("{packets:?}");
            let (taken, _) = received(packets, &dir.path().join("in"));
            assert!(taken.is_err(), "{what}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "{what}");
        }
    }
}
