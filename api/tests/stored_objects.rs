//! What earlier builds stored is read by this one. `stored/objects.bin` was written once, by the
//! build with the first types of format 2, and stays as it is: a test that fails here says that an
//! upgrade would lose a swarm.

use std::collections::{BTreeMap, BTreeSet};

use skep_api::attachment::NetworkAttachment;
use skep_api::cluster::{Cluster, ClusterSpec, JoinTokens, RootCa};
use skep_api::container::Driver;
use skep_api::network::{Ipam, Network, NetworkSpec};
use skep_api::node::{
    DataPath, EngineDescription, Node, NodeDescription, NodeSpec, NodeState, NodeStatus, RaftMember, TlsInfo,
};
use skep_api::service::{Endpoint, Protocol, Service, ServiceSpec, UpdateState, UpdateStatus, VirtualIp};
use skep_api::task::{Attachment, ContainerStatus, Platform, PortStatus, Resources, Slot, Task, TaskState, TaskStatus};
use skep_api::units::{ByteSize, NanoCpus};
use skep_api::{
    AttachmentId, ClusterId, Config, ConfigId, ConfigSpec, Ipv6Side, JobStatus, Meta, NetworkId, NodeId, Object,
    Secret, SecretBytes, SecretId, SecretSpec, ServiceId, TaskId, Timestamp, encoding,
};

const STORED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stored/objects.bin");

fn meta(version: u64) -> Meta {
    let at = |seconds: i64| Timestamp::from_nanos(seconds * 1_000_000_000);
    Meta { version, spec_version: version - 1, created_at: at(1), updated_at: at(2) }
}

fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([("a".to_owned(), "b".to_owned())])
}

fn text(text: &str) -> SecretBytes {
    SecretBytes::new(text.as_bytes().to_vec())
}

fn driver() -> Driver {
    Driver { name: "golang".into(), options: labels() }
}

fn service_spec() -> ServiceSpec {
    serde_json::from_str(include_str!("stored/service.json")).expect("the service is described")
}

fn cluster() -> Cluster {
    Cluster {
        id: ClusterId::from_u128(1),
        meta: meta(2),
        spec: ClusterSpec { labels: labels(), ..ClusterSpec::default() },
        root_ca: RootCa {
            certificate_pem: "certificate".into(),
            key_pem: text("key"),
            cross_signed_pem: String::new(),
        },
        join_tokens: JoinTokens { worker: text("worker"), manager: text("manager") },
        unlock_key: text("unlock"),
        removed_nodes: BTreeSet::from([NodeId::from_u128(9)]),
        data_path_port: 4789,
        default_addr_pool: vec!["10.0.0.0/8".into()],
        subnet_size: 24,
        incarnation: 0,
        next_root: None,
    }
}

fn node() -> Node {
    let platform = Platform { architecture: "x86_64".into(), os: "linux".into() };
    let resources =
        Resources { nano_cpus: NanoCpus(2_000_000_000), memory_bytes: ByteSize(1 << 30), ..Resources::default() };
    Node {
        id: NodeId::from_u128(3),
        meta: meta(4),
        spec: NodeSpec { labels: labels(), ..NodeSpec::default() },
        description: NodeDescription {
            hostname: "n1".into(),
            platform,
            resources,
            engine: EngineDescription { engine_version: "0.1.0".into(), labels: labels() },
            tls: TlsInfo {
                trust_root: "root".into(),
                cert_issuer_subject: "c3ViamVjdA==".into(),
                cert_issuer_public_key: "a2V5".into(),
            },
            csi: Vec::new(),
            data_path: Some(DataPath {
                keys: vec![[7; 32]],
                addr: "10.99.0.1".into(),
                port: 4789,
                kernel_port: Some(4790),
            }),
        },
        status: NodeStatus { state: NodeState::Ready, message: String::new(), addr: "10.99.0.1".into() },
        raft: Some(RaftMember { raft_id: 5, addr: "10.99.0.1:2377".into() }),
        bulk_port: 7946,
    }
}

fn service() -> Service {
    let spec = service_spec();
    let address = VirtualIp { network: NetworkId::from_u128(1), address: [10, 0, 1, 2].into(), prefix_len: 24 };
    Service {
        id: ServiceId::from_u128(6),
        meta: meta(7),
        endpoint: Endpoint {
            spec: spec.endpoint_spec.clone().expect("the endpoint is described"),
            ports: spec.endpoint_spec.clone().expect("the endpoint is described").ports,
            virtual_ips: vec![address],
        },
        previous_spec: Some(spec.clone()),
        spec,
        update_status: Some(UpdateStatus {
            state: UpdateState::RollbackPaused,
            started_at: Timestamp::from_nanos(3),
            completed_at: Some(Timestamp::from_nanos(4)),
            message: "paused".into(),
        }),
        job_status: Some(JobStatus { iteration: 2, last_execution: Timestamp::from_nanos(5) }),
        removed: true,
    }
}

fn task() -> Task {
    let spec = service_spec();
    let ports = spec.endpoint_spec.clone().expect("the endpoint is described").ports;
    Task {
        id: TaskId::from_u128(8),
        meta: meta(9),
        labels: labels(),
        spec: spec.task_template,
        service_id: ServiceId::from_u128(6),
        service_name: "web".into(),
        ports: ports.clone(),
        slot: Slot::Replica(3),
        mesh_ports: vec![(Protocol::Udp, 53)],
        networks: vec![Attachment { network: NetworkId::from_u128(1), address: [10, 0, 1, 3].into() }],
        node_id: Some(NodeId::from_u128(3)),
        status: TaskStatus {
            timestamp: Timestamp::from_nanos(6),
            state: TaskState::Failed,
            message: "started".into(),
            error: "exit 1".into(),
            container_status: Some(ContainerStatus { container_id: "c".into(), pid: 7, exit_code: 1 }),
            port_status: PortStatus { ports },
        },
        desired_state: TaskState::Shutdown,
        job_iteration: Some(2),
        running_since: Some(Timestamp::from_nanos(7)),
        usual_log_driver: None,
        assigned: Vec::new(),
        volumes: Vec::new(),
    }
}

fn network() -> Network {
    let subnet = "10.0.1.0/24".parse().expect("it is a network");
    let subnet_v6 = "fd00:1::/64".parse().expect("it is a network");
    let gateway_v6 = "fd00:1::1".parse().expect("it is an address");
    Network {
        id: NetworkId::from_u128(1),
        meta: meta(10),
        spec: NetworkSpec {
            name: "front".into(),
            labels: labels(),
            driver: driver(),
            ipam: Ipam {
                driver: "default".into(),
                options: labels(),
                subnet: Some(subnet),
                range: Some(subnet),
                gateway: Some([10, 0, 1, 1].into()),
                reserved: BTreeMap::from([("x".into(), [10, 0, 1, 9].into())]),
                subnet_v6: Some(subnet_v6),
                gateway_v6: Some(gateway_v6),
            },
            ipv6: true,
            internal: true,
            attachable: true,
            ingress: false,
        },
        subnet,
        gateway: [10, 0, 1, 1].into(),
        v6: Some(Ipv6Side { subnet: subnet_v6, gateway: gateway_v6 }),
        cursor: 11,
    }
}

/// One of each kind, with something in every field that the first types had.
fn objects() -> Vec<Object> {
    let secret = SecretSpec {
        name: "s".into(),
        labels: labels(),
        data: text("hidden"),
        driver: Some(driver()),
        templating: Some(driver()),
    };
    let config = ConfigSpec { name: "c".into(), labels: labels(), data: text("shown"), templating: Some(driver()) };
    vec![
        cluster().into(),
        node().into(),
        service().into(),
        task().into(),
        Secret { id: SecretId::from_u128(12), meta: meta(13), spec: secret }.into(),
        Config { id: ConfigId::from_u128(14), meta: meta(15), spec: config }.into(),
        network().into(),
        NetworkAttachment {
            id: AttachmentId::from_u128(16),
            meta: meta(17),
            node: NodeId::from_u128(3),
            container: "c".into(),
            network: NetworkId::from_u128(1),
            address: [10, 0, 1, 7].into(),
            names: vec!["n".into()],
        }
        .into(),
    ]
}

#[test]
fn what_the_first_build_of_the_format_stored_is_read() {
    let stored = std::fs::read(STORED).expect("the file is there");
    let read: Vec<Object> = encoding::decode(&stored).expect("this build reads it");
    assert_eq!(read, objects());
}

#[test]
fn cut_or_changed_objects_are_refused_without_a_panic() {
    let stored = std::fs::read(STORED).expect("the file is there");
    for len in 0..stored.len() {
        assert!(encoding::decode::<Vec<Object>>(&stored[..len]).is_err(), "cut at {len}");
    }
    for at in 1..stored.len() {
        let mut changed = stored.clone();
        changed[at] ^= 0xff;
        // Many a change gives another value of the same shape; none may end in anything else.
        let _ = encoding::decode::<Vec<Object>>(&changed);
    }
}

/// For a new kind of object or a new format, never for a new field: `cargo test -- --ignored write`.
#[test]
#[ignore = "writes what the other tests read"]
fn write() {
    std::fs::write(STORED, encoding::encode(&objects())).expect("the file is written");
}
