//! Carries a command out on the leader.

use skep_api::Timestamp;
use skep_raft_store::{Store, Tables, Transaction};

use super::{Command, ControlError, Outcome, Reason, cluster, network, node, payload, service, volume};

/// A change made from the tables as they are; made anew if they change meanwhile.
pub(super) type Change = Result<(Transaction, Outcome), ControlError>;

/// Below this nothing new is taken, so that what is there goes on and can be removed, in bytes.
const ROOM_KEPT: u64 = 16 << 20;

/// Checks and proposes; the answer is given once the change is applied here.
pub(crate) async fn execute(store: &Store, command: Command, now: Timestamp) -> Result<Outcome, ControlError> {
    if command.adds()
        && let Ok(room @ ..ROOM_KEPT) = store.room_bytes()
    {
        let message = format!(
            "the disk of the leading manager is full: {} KiB are left for its store, and nothing new is taken below {} KiB; \
             free some space there",
            room >> 10,
            ROOM_KEPT >> 10
        );
        return Err(ControlError::new(Reason::Unavailable, message));
    }
    store.update(|tables| change(tables, command.clone(), now)).await.map_err(Into::into)
}

fn change(tables: &Tables, command: Command, now: Timestamp) -> Change {
    let mut transaction = Transaction::new(now);
    let tx = &mut transaction;
    let outcome = match command {
        Command::UpdateCluster {
            version,
            spec,
            rotate_worker_token,
            rotate_manager_token,
            rotate_unlock_key,
            root_key,
        } => {
            let rotate = cluster::Rotate {
                worker: rotate_worker_token,
                manager: rotate_manager_token,
                unlock_key: rotate_unlock_key,
                root_key,
                now,
            };
            cluster::update(tables, tx, version, spec, &rotate)
        }
        Command::CreateService { spec } => service::create(tables, tx, spec),
        Command::UpdateService { id, version, change } => service::update(tables, tx, id, version, change),
        Command::RemoveService { id } => service::remove(tables, tx, id),
        Command::UpdateNode { id, version, spec } => node::update(tables, tx, id, version, spec),
        Command::RemoveNode { id, force } => node::remove(tables, tx, id, force),
        Command::AdmitNode { id, role, availability } => node::admit(tx, id, role, availability),
        Command::CreateSecret { spec } => payload::create_secret(tx, spec),
        Command::UpdateSecret { id, version, spec } => payload::update_secret(tables, tx, id, version, spec),
        Command::RemoveSecret { id } => payload::remove_secret(tables, tx, id),
        Command::CreateConfig { spec } => payload::create_config(tx, spec),
        Command::UpdateConfig { id, version, spec } => payload::update_config(tables, tx, id, version, spec),
        Command::RemoveConfig { id } => payload::remove_config(tables, tx, id),
        Command::CreateNetwork { spec } => network::create(tables, tx, spec),
        Command::RemoveNetwork { id } => network::remove(tables, tx, id),
        Command::CreateVolume { spec } => volume::create(tables, tx, spec),
        Command::UpdateVolume { id, version, spec } => volume::update(tables, tx, id, version, spec),
        Command::RemoveVolume { id, force } => volume::remove(tables, tx, id, force),
    }?;
    Ok((transaction, outcome))
}
