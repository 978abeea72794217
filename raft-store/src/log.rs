//! The raft log, the vote and the snapshot on sled, sealed.
//!
//! Appends are handed to one flushing thread, which flushes once for all that arrived meanwhile:
//! many proposals, one fsync.

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;
use std::sync::{Arc, OnceLock, mpsc};

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use serde::Serialize;
use serde::de::DeserializeOwned;
use skep_api::encoding;

use crate::activity::Activity;
use crate::raft_types::{Entry, LogId, Types, Vote};
use crate::seal::{DataKey, Sealer};
use crate::watermark::Watermark;

const LOG: &str = "log";
const META: &str = "meta";
const SNAPSHOT: &str = "snapshot";
/// What entries for another manager come to at most, unless a single one is longer.
const MESSAGE_LEN: usize = 256 << 10;
const CACHE_LEN: u64 = 8 << 20;

/// What waits for the next flush.
enum Flush {
    Append { last: u64, done: IOFlushed<Types> },
    Sync(tokio::sync::oneshot::Sender<io::Result<()>>),
}

/// One manager's durable state.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: sled::Tree,
    meta: sled::Tree,
    snapshot: sled::Tree,
    sealer: Sealer,
    watermark: Arc<Watermark>,
    flushes: mpsc::SyncSender<Flush>,
    pub(crate) activity: Arc<Activity>,
    /// What the disk said when a write failed: consensus ends with it.
    pub(crate) failure: Arc<OnceLock<String>>,
}

/// Appends waiting for a flush at most; more wait in the caller.
const FLUSHES_MAX: usize = 4096;

impl LogStore {
    /// Opens the store in `dir` and verifies every record of the log.
    pub(crate) fn open(dir: &Path, key: &DataKey) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let db = sled::Config::new()
            .path(dir.join("db"))
            .cache_capacity(CACHE_LEN)
            .flush_every_ms(None)
            .mode(sled::Mode::HighThroughput)
            .open()
            .map_err(disk_error)?;
        let watermark = Arc::new(Watermark::open(&dir.join("watermark"))?);
        let (flushes, waiting) = mpsc::sync_channel(FLUSHES_MAX);
        let store = Self {
            log: db.open_tree(LOG).map_err(disk_error)?,
            meta: db.open_tree(META).map_err(disk_error)?,
            snapshot: db.open_tree(SNAPSHOT).map_err(disk_error)?,
            sealer: Sealer::new(key),
            watermark: watermark.clone(),
            flushes,
            activity: Arc::default(),
            failure: Arc::default(),
        };
        store.verify()?;
        let (activity, failure) = (store.activity.clone(), store.failure.clone());
        std::thread::Builder::new().name("raft-flush".into()).spawn(move || {
            while let Ok(first) = waiting.recv() {
                flush(&db, &watermark, &failure, std::iter::once(first).chain(waiting.try_iter()).collect());
                activity.count_flush();
            }
        })?;
        Ok(store)
    }

    /// Reads all there is: what cannot be opened, or is missing, is an error now and not later.
    fn verify(&self) -> io::Result<()> {
        let mut next = self.purged()?.map_or(0, |id| id.index + 1);
        for record in self.log.iter() {
            let (key, sealed) = record.map_err(disk_error)?;
            let entry: Entry = self.unseal(LOG, &key, &sealed)?;
            if entry.log_id.index != next {
                return Err(damaged(format!("log entry {next} is missing")));
            }
            next += 1;
        }
        let reached = self.watermark.read()?;
        if next < reached {
            return Err(damaged(format!("log entries {next} to {} were stored and are gone", reached - 1)));
        }
        Ok(())
    }

    fn unseal<T: DeserializeOwned>(&self, tree: &str, key: &[u8], sealed: &[u8]) -> io::Result<T> {
        let plain = self.sealer.open(tree, key, sealed).map_err(|broken| damaged(broken.to_string()))?;
        encoding::decode_serde(&plain).map_err(|error| damaged(error.to_string()))
    }

    fn read_meta<T: DeserializeOwned>(&self, key: &str) -> io::Result<Option<T>> {
        let sealed = self.meta.get(key).map_err(disk_error)?;
        sealed.map(|sealed| self.unseal(META, key.as_bytes(), &sealed)).transpose()
    }

    fn write_meta<T: Serialize>(&self, key: &str, value: &T) -> io::Result<()> {
        let sealed = self.sealer.seal(META, key.as_bytes(), &encoding::encode_serde(value));
        self.meta.insert(key, sealed).map_err(disk_error)?;
        Ok(())
    }

    fn purged(&self) -> io::Result<Option<LogId>> {
        self.read_meta("purged")
    }

    /// Waits until all that was written is on disk.
    async fn sync(&self) -> io::Result<()> {
        let (done, wait) = tokio::sync::oneshot::channel();
        self.flushes.try_send(Flush::Sync(done)).map_err(io::Error::other)?;
        wait.await.map_err(io::Error::other)?
    }

    /// Puts a snapshot in place of the one before, its head last.
    pub(crate) async fn save_snapshot<M: Serialize>(&self, meta: &M, parts: &[bytes::Bytes]) -> io::Result<()> {
        let before: Option<(u64, u32)> = self.read_meta("snapshot-parts")?;
        let generation = before.map_or(0, |(generation, _)| generation + 1);
        for (number, part) in (0u32..).zip(parts) {
            let key = part_key(generation, number);
            let sealed = self.sealer.seal(SNAPSHOT, &key, part);
            self.snapshot.insert(key, sealed).map_err(disk_error)?;
        }
        self.sync().await?;
        let count = u32::try_from(parts.len()).map_err(io::Error::other)?;
        self.write_meta("snapshot", meta)?;
        self.write_meta("snapshot-parts", &(generation, count))?;
        self.sync().await?;
        if let Some((generation, count)) = before {
            for number in 0..count {
                self.snapshot.remove(part_key(generation, number)).map_err(disk_error)?;
            }
        }
        Ok(())
    }

    /// The snapshot's head and parts, if there is one.
    pub(crate) fn load_snapshot<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<bytes::Bytes>)>> {
        let Some(meta) = self.read_meta("snapshot")? else { return Ok(None) };
        let (generation, count): (u64, u32) =
            self.read_meta("snapshot-parts")?.ok_or_else(|| damaged("the snapshot has no list of parts".into()))?;
        let mut parts = Vec::new();
        for number in 0..count {
            let key = part_key(generation, number);
            let sealed = self
                .snapshot
                .get(key)
                .map_err(disk_error)?
                .ok_or_else(|| damaged(format!("part {number} of the snapshot is missing")))?;
            let plain = self.sealer.open(SNAPSHOT, &key, &sealed).map_err(|broken| damaged(broken.to_string()))?;
            parts.push(plain.into());
        }
        Ok(Some((meta, parts)))
    }
}

fn part_key(generation: u64, number: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&generation.to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

/// Keeps what the disk said: whether it is full is of interest.
fn disk_error(error: sled::Error) -> io::Error {
    match error {
        sled::Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Flushes once for all that wait, and tells them.
fn flush(db: &sled::Db, watermark: &Watermark, failure: &OnceLock<String>, batch: Vec<Flush>) {
    let flushed = db.flush().map(drop).map_err(disk_error);
    let last = batch.iter().filter_map(|flush| match flush {
        Flush::Append { last, .. } => Some(*last),
        Flush::Sync(_) => None,
    });
    let result = flushed.and_then(|()| last.max().map_or(Ok(()), |last| watermark.write(last + 1)));
    if let Err(error) = &result {
        failure.get_or_init(|| error.to_string());
    }
    for flush in batch {
        let result = result.as_ref().map(|&()| ()).map_err(|error| io::Error::new(error.kind(), error.to_string()));
        match flush {
            Flush::Append { done, .. } => done.io_completed(result),
            // A caller that went away needs no answer.
            Flush::Sync(done) => drop(done.send(result)),
        }
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let bound = |bound: std::ops::Bound<&u64>| bound.map(|index| index.to_be_bytes());
        let keys = (bound(range.start_bound()), bound(range.end_bound()));
        self.log
            .range::<[u8; 8], _>(keys)
            .map(|record| {
                let (key, sealed) = record.map_err(disk_error)?;
                self.unseal(LOG, &key, &sealed)
            })
            .collect()
    }

    /// One message's worth of entries, one at least.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let (mut entries, mut len) = (Vec::new(), 0);
        for record in self.log.range(start.to_be_bytes()..end.to_be_bytes()) {
            let (key, sealed) = record.map_err(disk_error)?;
            len += sealed.len();
            if len > MESSAGE_LEN && !entries.is_empty() {
                break;
            }
            entries.push(self.unseal(LOG, &key, &sealed)?);
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.read_meta("vote")
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let last_purged_log_id = self.purged()?;
        let last = self.log.last().map_err(disk_error)?;
        let last = last.map(|(key, sealed)| self.unseal::<Entry>(LOG, &key, &sealed)).transpose()?;
        Ok(LogState { last_purged_log_id, last_log_id: last.map(|entry| entry.log_id).or(last_purged_log_id) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.write_meta("vote", vote)?;
        self.sync().await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        // Not flushed: it only saves work after a restart, and may be behind.
        self.write_meta("committed", &committed)
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        self.read_meta::<Option<LogId>>("committed").map(Option::flatten)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut batch = sled::Batch::default();
        let (mut last, mut count) = (0, 0);
        for entry in entries {
            last = entry.log_id.index;
            count += 1;
            let key = last.to_be_bytes();
            batch.insert(&key, self.sealer.seal(LOG, &key, &encoding::encode_serde(&entry)));
        }
        self.log.apply_batch(batch).map_err(disk_error)?;
        self.activity.count_entries(count);
        self.flushes.send(Flush::Append { last, done: callback }).map_err(|_| io::Error::other("the log is closed"))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let first_gone = last_log_id.map_or(0, |id| id.index + 1);
        // The witness goes down first, so that it is never ahead.
        self.watermark.write(first_gone)?;
        let mut batch = sled::Batch::default();
        for key in self.log.range(first_gone.to_be_bytes()..).keys() {
            batch.remove(key.map_err(disk_error)?);
        }
        self.log.apply_batch(batch).map_err(disk_error)?;
        self.sync().await
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        self.write_meta("purged", &log_id)?;
        self.sync().await?;
        let mut batch = sled::Batch::default();
        for key in self.log.range(..=log_id.index.to_be_bytes()).keys() {
            batch.remove(key.map_err(disk_error)?);
        }
        self.log.apply_batch(batch).map_err(disk_error)
    }
}
