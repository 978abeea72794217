//! What carries this node's networks while it has any: kernel and data path, what was put in force there,
//! and what must outlive the daemon to be taken up again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use skep_api::overlay::{Fact, FactKey};
use skep_api::{NodeId, SecretBytes};
use skep_host_net::RuleWatch;
use skep_host_net::nfnetlink::{Batch, PacketFilter};

use crate::adoption::{Frames, left_over};
use crate::conntrack::Forgetter;
use crate::kernel::Kernel;
use crate::path::client::PathClient;
use crate::path::message::PeerIndex;
use crate::plan::{Desired, LocalContainer, MESH_TABLE, TABLE};
use crate::retarget;
use crate::ruleset::Tables;
use crate::serving::Turned;

/// How long the data path's process may take to end before it is killed.
const END_LIMIT: Duration = Duration::from_secs(2);

/// What is in force while there is any network here.
pub(crate) struct Carrier {
    pub(crate) kernel: Kernel,
    pub(crate) path: PathClient,
    applied: Desired,
    /// Where the frames of the rules inside are noted.
    frames_file: PathBuf,
    noted: Noted,
    /// The rules inside and outside.
    watched: [RuleWatch; 2],
    forgetter: Forgetter,
    /// To the rules inside.
    filter: Arc<PacketFilter>,
    pub(crate) indexes: BTreeMap<NodeId, PeerIndex>,
    /// The containers and the keys that what is in force was planned for.
    pub(crate) basis: (BTreeMap<String, LocalContainer>, Vec<SecretBytes>),
}

/// What is noted of the rules' frames.
#[derive(Clone, Copy, Debug)]
enum Noted {
    Nothing,
    Frames(Frames),
    /// It cannot be done here.
    Never,
}

impl Carrier {
    /// Nothing is known of what is in force.
    pub(crate) async fn new(
        kernel: Kernel,
        path: PathClient,
        indexes: BTreeMap<NodeId, PeerIndex>,
        frames_file: PathBuf,
    ) -> io::Result<Self> {
        let filter = Arc::new(kernel.netns().run(PacketFilter::open).await?);
        let port = filter.port()?;
        let inside = kernel.netns().run(move || RuleWatch::open(TABLE, port)).await?;
        // Scripts alone change those.
        let outside = RuleWatch::open(MESH_TABLE, 0)?;
        let forgetter = Forgetter::start(kernel.netns().clone());
        Ok(Self {
            kernel,
            path,
            forgetter,
            applied: Desired::default(),
            noted: Frames::load(&frames_file).map_or(Noted::Nothing, Noted::Frames),
            frames_file,
            watched: [inside, outside],
            filter,
            indexes,
            basis: Default::default(),
        })
    }

    pub(crate) async fn put_in_force(&mut self, desired: Desired, fresh: bool) -> io::Result<()> {
        if fresh {
            // What a data path that ran before holds is not known.
            self.path.replace(desired.path.clone()).await?;
        } else {
            self.path.update(desired.path.clone()).await?;
        }
        let come: BTreeSet<IpAddr> = desired.living.difference(&self.applied.living).copied().collect();
        self.forgetter.settled(&come).await;
        let peers: BTreeSet<PeerIndex> = self.indexes.values().copied().collect();
        self.kernel.set_routes(peers, desired.path.subnets.clone()).await?;
        self.kernel.set_plain(desired.plain.clone()).await?;
        self.kernel.set_sealed(desired.sealed.clone()).await;
        match desired.inside.direct_difference(&self.applied.inside).filter(|_| !fresh) {
            Some(differences) => self.commit(retarget::batch(&differences)).await?,
            None => self.put_in_force_by_script(&desired.inside, fresh).await?,
        }
        let outside = if fresh { desired.outside.script() } else { desired.outside.script_from(&self.applied.outside) };
        if !outside.is_empty() {
            let applied = tokio::task::spawn_blocking(move || skep_host_net::apply(&outside));
            self.watched[1].expect(applied.await.map_err(io::Error::other)??);
        }
        self.kernel.set_fast_path(&desired.fast_path).await;
        let dead: BTreeSet<IpAddr> = self.applied.living.difference(&desired.living).copied().collect();
        if !dead.is_empty() {
            // Or packets of old connections would be sent to nobody, or to a newcomer.
            self.forgetter.forget(dead);
        }
        self.applied = desired;
        Ok(())
    }

    /// Writes the rules inside. What an earlier daemon left of them stays as it is.
    async fn put_in_force_by_script(&mut self, inside: &Tables, fresh: bool) -> io::Result<()> {
        let left = match self.noted {
            Noted::Frames(noted) if fresh => {
                let like = inside.hollow();
                let left = self.kernel.netns().run(move || left_over(&like, noted)).await;
                left.inspect_err(|error| tracing::info!(%error, "the rules are made anew")).unwrap_or_default()
            }
            _ => None,
        };
        if let Some(left) = left {
            match self.run_script(inside.script_from(&left)).await {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!(%error, "the rules cannot be taken over: they are made anew"),
            }
        }
        if !fresh {
            return self.run_script(inside.script_from(&self.applied.inside)).await;
        }
        self.noted = Noted::Nothing;
        self.run_script(inside.script()).await
    }

    /// Changes the rules inside, if there is anything to change.
    async fn run_script(&mut self, script: String) -> io::Result<()> {
        if !script.is_empty() {
            let program = self.kernel.netns().run(move || skep_host_net::apply(&script)).await?;
            self.watched[0].expect(program);
        }
        Ok(())
    }

    /// Notes how the rules' frames look, for the next daemon.
    async fn note_frames(&mut self) {
        match self.noted {
            Noted::Never => return,
            Noted::Frames(noted) if noted.are_of(&self.applied.inside) => return,
            Noted::Frames(_) | Noted::Nothing => {}
        }
        let (inside, file) = (self.applied.inside.hollow(), self.frames_file.clone());
        let noted = self.kernel.netns().run(move || {
            let listed = Frames::listed(&inside)?;
            listed.map(|frames| frames.save(&file)).transpose()?;
            Ok(listed)
        });
        self.noted = match noted.await {
            Ok(frames) => frames.map_or(Noted::Nothing, Noted::Frames),
            Err(error) => {
                tracing::info!(%error, "the next daemon will make the rules anew");
                Noted::Never
            }
        };
    }

    /// Puts in force that other tasks take connections; says whether that could be done so.
    pub(crate) async fn turn(&mut self, turned: Turned) -> io::Result<bool> {
        let Some((change, batch)) = turned.put_into(&mut self.applied) else { return Ok(false) };
        self.path.change(change).await?;
        self.commit(batch).await?;
        Ok(true)
    }

    /// Changes rules inside; the kernel may still be clearing away what was replaced before.
    async fn commit(&self, batch: Batch) -> io::Result<()> {
        let filter = self.filter.clone();
        tokio::task::spawn_blocking(move || filter.commit(batch)).await.map_err(io::Error::other)?
    }

    /// Fails if anything is not as it was left.
    pub(crate) async fn audit(&mut self) -> io::Result<()> {
        self.path.sync().await?;
        self.kernel.check_wire().await?;
        self.kernel.look_at_sealed(&self.applied.sealed).await;
        // Each is asked: what it has heard is heard once.
        let [inside, outside] = self.watched.each_mut().map(RuleWatch::touched_by_others);
        if inside || outside {
            return Err(io::Error::other("somebody else changed its rules"));
        }
        self.note_frames().await;
        Ok(())
    }
}

/// Gives every new peer a number of its own; a number is never given to another.
pub(crate) fn number_peers(indexes: &mut BTreeMap<NodeId, PeerIndex>, facts: &BTreeMap<FactKey, Fact>, own: NodeId) {
    for key in facts.keys() {
        let FactKey::Peer(node) = key else { continue };
        if *node == own || indexes.contains_key(node) {
            continue;
        }
        let taken: BTreeSet<PeerIndex> = indexes.values().copied().collect();
        if let Some(free) = (1..PeerIndex::MAX / 2).find(|index| !taken.contains(index)) {
            indexes.insert(*node, free);
        }
    }
}

pub(crate) fn load_indexes(path: &Path) -> BTreeMap<NodeId, PeerIndex> {
    fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Connections that are open know peers by their numbers: a restart must not mix them up.
pub(crate) fn save_indexes(path: &Path, indexes: &BTreeMap<NodeId, PeerIndex>) -> io::Result<()> {
    if load_indexes(path) == *indexes {
        return Ok(());
    }
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(indexes)?)?;
    fs::rename(&new, path)
}

/// Ends the data path's process, which whoever listens on the socket is; its port is free then.
pub(crate) async fn end_process(socket: &Path) {
    let Ok(stream) = std::os::unix::net::UnixStream::connect(socket) else { return };
    let Ok(peer) = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials) else { return };
    let pid = nix::unistd::Pid::from_raw(peer.pid());
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        // Gone already is just as well.
        let _ = nix::sys::signal::kill(pid, signal);
        let deadline = tokio::time::Instant::now() + END_LIMIT;
        while runs(pid) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Whether a process has not ended yet; one that is only waited for has.
fn runs(pid: nix::unistd::Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}
