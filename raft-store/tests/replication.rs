//! Three stores in one process, joined by a switchboard that can cut any of them off: what is
//! acknowledged survives, and what was tampered with is found.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use skep_api::node::RaftMember;
use skep_api::{Secret, SecretBytes, SecretId, SecretSpec, Timestamp};
use skep_raft_store::{
    DataKey, OtherMember, PeerError, Peers, ProposeError, Refusal, RpcKind, Store, StoreConfig, Transaction,
};

const LIMIT: Duration = Duration::from_secs(20);

/// The wires between the stores of one test.
#[derive(Clone)]
struct Switchboard {
    from: String,
    shared: Arc<Mutex<Lines>>,
}

#[derive(Default)]
struct Lines {
    stores: BTreeMap<String, Store>,
    cut: BTreeSet<String>,
}

impl Switchboard {
    fn store(&self, addr: &str) -> Result<Store, PeerError> {
        let lines = self.shared.lock().unwrap();
        let error = || PeerError { addr: addr.into(), reason: "cut off".into() };
        if lines.cut.contains(addr) || lines.cut.contains(&self.from) {
            return Err(error());
        }
        lines.stores.get(addr).cloned().ok_or_else(error)
    }
}

impl Peers for Switchboard {
    async fn call(&self, to: &RaftMember, kind: RpcKind, body: Vec<u8>, _: Duration) -> Result<Vec<u8>, PeerError> {
        self.store(&to.addr)?.handle_rpc(to.raft_id, kind, &body).await.map_err(|error| refused(to, &error))
    }

    async fn send_snapshot(
        &self,
        to: &RaftMember,
        header: Vec<u8>,
        parts: Vec<bytes::Bytes>,
        _: Duration,
    ) -> Result<Vec<u8>, PeerError> {
        self.store(&to.addr)?.handle_snapshot(to.raft_id, &header, parts).await.map_err(|error| refused(to, &error))
    }
}

fn refused(to: &RaftMember, error: &OtherMember) -> PeerError {
    PeerError { addr: to.addr.clone(), reason: error.to_string() }
}

struct Swarm {
    dir: tempfile::TempDir,
    shared: Arc<Mutex<Lines>>,
}

impl Swarm {
    async fn of_three() -> Self {
        let swarm = Self { dir: tempfile::tempdir().unwrap(), shared: Arc::default() };
        swarm.start(1).await.initialize("m1").await.unwrap();
        let leader = swarm.leader(&[1]).await;
        for id in [2, 3] {
            swarm.start(id).await;
            leader.add_member(id, &format!("m{id}")).await.unwrap();
        }
        swarm
    }

    async fn start(&self, id: u64) -> Store {
        let store = open(self.dir.path(), id, self.shared.clone()).await.unwrap();
        self.shared.lock().unwrap().stores.insert(format!("m{id}"), store.clone());
        store
    }

    fn store(&self, id: u64) -> Store {
        self.shared.lock().unwrap().stores[&format!("m{id}")].clone()
    }

    fn cut(&self, id: u64, cut: bool) {
        let mut lines = self.shared.lock().unwrap();
        if cut {
            lines.cut.insert(format!("m{id}"))
        } else {
            lines.cut.remove(&format!("m{id}"))
        };
    }

    /// The store among `ids` that leads, once one does and can prove it.
    async fn leader(&self, ids: &[u64]) -> Store {
        tokio::time::timeout(LIMIT, async {
            loop {
                for &id in ids {
                    let store = self.store(id);
                    if store.leadership().borrow().is_leader && store.read_index().await.is_ok() {
                        return store;
                    }
                }
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("a leader in time")
    }
}

async fn open(dir: &Path, id: u64, shared: Arc<Mutex<Lines>>) -> Result<Store, skep_raft_store::OpenError> {
    let dir = dir.join(format!("m{id}"));
    std::fs::create_dir_all(&dir).unwrap();
    let config = StoreConfig {
        raft_id: id,
        key: DataKey::load_or_create(&dir.join("key"), None).unwrap(),
        dir,
        heartbeat: Duration::from_millis(50),
        election_timeout: Duration::from_millis(150),
        snapshot_interval: 50,
        log_entries_kept: 10,
    };
    Store::open(config, Switchboard { from: format!("m{id}"), shared }).await
}

fn put(number: u128) -> Transaction {
    let mut transaction = Transaction::new(Timestamp::from_nanos(1));
    transaction.create(Secret {
        id: SecretId::from_u128(number),
        meta: skep_api::Meta::default(),
        spec: SecretSpec {
            name: format!("s{number}"),
            data: SecretBytes::new(b"top-secret-payload".to_vec()),
            ..SecretSpec::default()
        },
    });
    transaction
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledged_write_survives_the_loss_of_the_leader() {
    let swarm = Swarm::of_three().await;
    let first = swarm.leader(&[1, 2, 3]).await;
    let index = first.propose(&put(1)).await.unwrap();
    let lost = first.leadership().borrow().leader.unwrap();
    swarm.cut(lost, true);
    let rest: Vec<u64> = [1, 2, 3].into_iter().filter(|&id| id != lost).collect();
    let second = swarm.leader(&rest).await;
    assert!(second.wait_applied(index, LIMIT).await);
    assert!(second.view().secrets.by_name("s1").is_some());
    second.propose(&put(2)).await.unwrap();

    // The minority answers no linearizable read and takes no write.
    assert!(matches!(first.read_index().await, Err(ProposeError::NotLeader { .. } | ProposeError::TimedOut(_))));
    swarm.cut(lost, false);
    let caught_up = swarm.store(lost);
    let index = second.read_index().await.unwrap();
    assert!(caught_up.wait_applied(index, LIMIT).await);
    assert_eq!(caught_up.view().secrets.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_at_the_address_of_a_lost_member_has_no_part_in_its_vote() {
    let swarm = Swarm::of_three().await;
    swarm.leader(&[1, 2, 3]).await;
    swarm.store(1).shutdown().await;
    swarm.cut(1, true);
    swarm.store(3).shutdown().await;
    let newcomer = open(swarm.dir.path(), 33, swarm.shared.clone()).await.unwrap();
    swarm.shared.lock().unwrap().stores.insert("m3".into(), newcomer.clone());
    // One of three is left, whatever is at the address of another.
    let second = swarm.store(2);
    let led =
        tokio::time::timeout(Duration::from_secs(2), second.leadership().wait_for(|now| now.is_leader)).await.is_ok();
    assert!(!led, "the newcomer voted for a member that is gone");
    assert!(newcomer.view().cluster().is_none() && newcomer.members().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_no_majority_hears_leads_no_more_until_one_does() {
    let swarm = Swarm::of_three().await;
    let leader = swarm.leader(&[1, 2, 3]).await;
    let others: Vec<u64> = [1, 2, 3].into_iter().filter(|&id| id != leader.raft_id()).collect();
    let mut leadership = leader.leadership();
    // All three alone: nobody takes over.
    others.iter().for_each(|&id| swarm.cut(id, true));
    let is_over = leadership.wait_for(|now| !now.is_leader && now.leader.is_none());
    tokio::time::timeout(LIMIT, is_over).await.expect("in time").unwrap();
    others.iter().for_each(|&id| swarm.cut(id, false));
    swarm.leader(&[1, 2, 3]).await.propose(&put(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_handed_over_on_request() {
    let swarm = Swarm::of_three().await;
    let leader = swarm.leader(&[1, 2, 3]).await;
    assert!(leader.transfer_leadership(LIMIT).await);
    assert!(!leader.leadership().borrow().is_leader);
    assert!(matches!(leader.propose(&put(1)).await, Err(ProposeError::NotLeader { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_write_is_left_in_doubt_by_a_handover() {
    let swarm = Swarm::of_three().await;
    let leader = swarm.leader(&[1, 2, 3]).await;
    let writers: Vec<_> = (0..8_u128)
        .map(|writer| {
            let leader = leader.clone();
            tokio::spawn(async move {
                for number in 0.. {
                    match leader.propose(&put(writer * 1_000_000 + number)).await {
                        Ok(_) => {}
                        Err(ProposeError::NotLeader { .. }) => return number,
                        Err(error) => panic!("{error}"),
                    }
                }
                unreachable!()
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(leader.transfer_leadership(LIMIT).await);
    let mut written = 0;
    for writer in writers {
        written += writer.await.unwrap();
    }
    let next = swarm.leader(&[1, 2, 3]).await;
    let index = next.read_index().await.unwrap();
    assert!(next.wait_applied(index, LIMIT).await);
    assert!(written > 0);
    assert_eq!(next.view().secrets.len() as u128, written, "all that was acknowledged is there, and nothing else");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_far_behind_catches_up_by_a_snapshot() {
    let swarm = Swarm::of_three().await;
    let leader = swarm.leader(&[1, 2, 3]).await;
    let behind = (1..=3).find(|&id| !swarm.store(id).leadership().borrow().is_leader).unwrap();
    swarm.cut(behind, true);
    for number in 0..150 {
        leader.propose(&put(number)).await.unwrap();
    }
    swarm.cut(behind, false);
    let index = leader.read_index().await.unwrap();
    assert!(swarm.store(behind).wait_applied(index, LIMIT).await);
    assert_eq!(swarm.store(behind).view().secrets.len(), 150);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_manager_has_all_it_acknowledged_and_two_writers_never_both_win() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1, Arc::default()).await.unwrap();
    store.initialize("m1").await.unwrap();
    let mut leadership = store.leadership();
    leadership.wait_for(|now| now.is_leader).await.unwrap();
    for number in 0..120 {
        store.propose(&put(number)).await.unwrap();
    }
    let read = store.view().secrets.by_name("s7").unwrap().as_ref().clone();
    let mut change = Transaction::new(Timestamp::from_nanos(2));
    change.update(read);
    let (one, two) = tokio::join!(store.propose(&change), store.propose(&change));
    let stale = |r: &Result<u64, ProposeError>| matches!(r, Err(ProposeError::Refused(Refusal::Stale { .. })));
    assert!(one.is_ok() && stale(&two) || two.is_ok() && stale(&one), "{one:?} {two:?}");
    store.shutdown().await;
    drop(store);

    let again = reopen(dir.path()).await.unwrap();
    again.leadership().wait_for(|now| now.is_leader).await.unwrap();
    assert_eq!(again.view().secrets.len(), 120);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_on_disk_is_not_readable_and_tampering_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1, Arc::default()).await.unwrap();
    store.initialize("m1").await.unwrap();
    store.leadership().wait_for(|now| now.is_leader).await.unwrap();
    for number in 0..20 {
        store.propose(&put(number)).await.unwrap();
    }
    store.shutdown().await;
    drop(store);
    drop(reopen(dir.path()).await.unwrap());

    let database = wait_unlocked(&dir.path().join("m1/db/db")).await;
    let bytes = std::fs::read(&database).unwrap();
    assert!(!bytes.windows(10).any(|window| window == b"top-secret"), "the payload lies open on disk");
    let mut found = 0;
    let written = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    for part in 1..8 {
        let mut changed = bytes.clone();
        let at = written * part / 8;
        changed[at..at + 64].iter_mut().for_each(|byte| *byte ^= 0x5a);
        std::fs::write(&database, &changed).unwrap();
        match reopen(dir.path()).await {
            Err(_) => found += 1,
            // A change in space the database no longer uses does no harm: all must still be there.
            Ok(store) => {
                store.leadership().wait_for(|now| now.is_leader).await.unwrap();
                assert_eq!(store.view().secrets.len(), 20, "data is missing and nothing was said (part {part})");
                store.shutdown().await;
            }
        }
        wait_unlocked(&database).await;
    }
    assert!(found > 0, "no tampering was noticed");
}

/// Opens the first manager's store again once the handle before has let go of it.
async fn reopen(dir: &Path) -> Result<Store, skep_raft_store::OpenError> {
    wait_unlocked(&dir.join("m1/db/db")).await;
    open(dir, 1, Arc::default()).await
}

/// Waits until no handle in this process holds the database's lock.
async fn wait_unlocked(database: &Path) -> std::path::PathBuf {
    let deadline = std::time::Instant::now() + LIMIT;
    while std::fs::File::open(database).is_ok_and(|file| file.try_lock().is_err()) {
        assert!(std::time::Instant::now() < deadline, "{} stays locked", database.display());
        tokio::task::yield_now().await;
    }
    database.to_owned()
}
