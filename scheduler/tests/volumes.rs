//! Which volumes of the swarm tasks get: how they are shared, and on how many nodes at a time.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeSet;
use std::sync::Arc;

use skep_api::container::{Driver, Mount, MountKind};
use skep_api::task::TaskSpec;
use skep_api::volume::{
    AccessMode, ClusterVolumeSpec, MountAccess, NodeCsiInfo, PublishState, PublishStatus, Scope, Sharing, VolumeInfo,
};
use skep_api::{Availability, Meta, NodeId, ServiceId, TaskId, Volume, VolumeId, VolumeSpec, node::testing};
use skep_scheduler::{ClusterView, Group, Occupant, Plan, place};

fn volume(number: u128, name: &str, scope: Scope, sharing: Sharing) -> Volume {
    let access_mode = AccessMode { scope, sharing, mount_volume: Some(MountAccess::default()), block_volume: None };
    let cluster = ClusterVolumeSpec { group: "pool".into(), access_mode, ..ClusterVolumeSpec::default() };
    Volume {
        id: VolumeId::from_u128(number),
        meta: Meta::default(),
        spec: VolumeSpec { name: name.into(), driver: Driver::named("disks"), cluster, ..VolumeSpec::default() },
        info: Some(VolumeInfo { volume_id: name.into(), ..VolumeInfo::default() }),
        publish_status: Vec::new(),
        pending_delete: false,
        problem: String::new(),
    }
}

/// Two nodes that have the driver, which takes so many volumes there, and one that has not.
fn cluster(volumes: Vec<Volume>, most: i64) -> ClusterView {
    let mut view = ClusterView::default();
    for number in 1..=3 {
        let mut node = testing::node(number);
        if number < 3 {
            let driver =
                NodeCsiInfo { plugin_name: "disks".into(), max_volumes_per_node: most, ..NodeCsiInfo::default() };
            node.description.csi.push(driver);
        }
        view.set_node(Arc::new(node));
    }
    volumes.into_iter().for_each(|volume| view.set_volume(Arc::new(volume)));
    view
}

fn place_tasks(view: &mut ClusterView, source: &str, read_only: bool, count: u128) -> Plan {
    let mut spec = TaskSpec::default();
    let mount =
        Mount { kind: MountKind::Cluster, source: source.into(), target: "/d".into(), read_only, ..Mount::default() };
    spec.container.mounts.push(mount);
    let occupant = Occupant { service: ServiceId::from_u128(1), spec: Arc::new(spec), ports: Vec::new() };
    place(view, &[Group { occupant, tasks: (1..=count).map(TaskId::from_u128).collect() }])
}

fn nodes(plan: &Plan) -> BTreeSet<NodeId> {
    plan.placements.iter().map(|&(_, node)| node).collect()
}

#[test]
fn volumes_are_shared_as_they_say() {
    // Of three tasks, by scope, sharing and what they do: how many find a place, and on how many nodes.
    let table = [
        (Scope::Single, Sharing::None, false, 1, 1),
        (Scope::Single, Sharing::All, false, 3, 1),
        (Scope::Multi, Sharing::None, false, 1, 1),
        (Scope::Multi, Sharing::OneWriter, false, 1, 1),
        (Scope::Multi, Sharing::OneWriter, true, 3, 2),
        (Scope::Multi, Sharing::ReadOnly, false, 0, 0),
        (Scope::Multi, Sharing::ReadOnly, true, 3, 2),
        (Scope::Multi, Sharing::All, false, 3, 2),
    ];
    for (scope, sharing, read_only, placed, on) in table {
        let mut view = cluster(vec![volume(1, "data", scope, sharing)], 0);
        let plan = place_tasks(&mut view, "data", read_only, 3);
        let case = format!("{scope:?} {sharing:?} read-only {read_only}: {plan:?}");
        assert_eq!((plan.placements.len(), nodes(&plan).len()), (placed, on), "{case}");
        assert_eq!(plan.volumes.len(), placed, "{case}");
        assert!(!nodes(&plan).contains(&NodeId::from_u128(3)), "{case}");
    }
}

#[test]
fn of_a_group_each_task_gets_another_one_and_of_nodes_those_with_room() {
    let pool = || vec![volume(1, "one", Scope::Single, Sharing::None), volume(2, "two", Scope::Single, Sharing::None)];
    let plan = place_tasks(&mut cluster(pool(), 0), "group:pool", false, 3);
    let given: BTreeSet<VolumeId> = plan.volumes.values().map(|given| given[0].id).collect();
    assert_eq!((plan.placements.len(), given.len()), (2, 2), "{plan:?}");
    // A driver that takes one volume a node puts them on two.
    let both: Vec<Volume> = pool().into_iter().chain([volume(3, "three", Scope::Single, Sharing::None)]).collect();
    let plan = place_tasks(&mut cluster(both, 1), "group:pool", false, 3);
    assert_eq!((plan.placements.len(), nodes(&plan).len()), (2, 2), "{plan:?}");
}

#[test]
fn a_volume_that_cannot_be_had_is_told_with_the_reason() {
    type Change = fn(&mut Volume);
    let table: [(Change, &str); 6] = [
        (|volume| volume.info = None, "volume data is not made yet"),
        (|volume| volume.spec.cluster.availability = Availability::Pause, "volume data is paused"),
        (|volume| volume.spec.cluster.availability = Availability::Drain, "volume data is drained"),
        (|volume| volume.pending_delete = true, "volume data is being removed"),
        (|volume| volume.spec.name = "other".into(), "there is no cluster volume data"),
        (|volume| volume.spec.driver.name = "tapes".into(), "cluster volumes not available on 3 nodes"),
    ];
    for (change, reason) in table {
        let mut wanted = volume(1, "data", Scope::Single, Sharing::None);
        change(&mut wanted);
        let plan = place_tasks(&mut cluster(vec![wanted], 0), "data", false, 1);
        assert!(plan.placements.is_empty() && plan.refusals[0].reason.contains(reason), "{plan:?}");
    }
}

#[test]
fn a_volume_for_one_node_waits_until_the_last_one_let_go_of_it() {
    let mut held = volume(1, "data", Scope::Single, Sharing::None);
    let (node, state) = (NodeId::from_u128(2), PublishState::PendingNodeUnpublish);
    held.publish_status.push(PublishStatus { node, driver_node: "n2".into(), state, publish_context: [].into() });
    let plan = place_tasks(&mut cluster(vec![held], 0), "data", false, 1);
    assert_eq!(nodes(&plan), [node].into(), "where it is already, it may be used again: {plan:?}");
}
