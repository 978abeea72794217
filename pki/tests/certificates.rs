//! Certificates as the CA makes them, and handshakes between nodes, in memory.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::{ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use skep_api::{ClusterId, NodeId, NodeRole};
use skep_pki::{NodeIdentity, PendingIdentity, RootAuthority, Subject, TlsIdentity, pinned_client_config};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn subject(node: u128, role: NodeRole) -> Subject {
    Subject { node: NodeId::from_u128(node), role, cluster: ClusterId::from_u128(1) }
}

fn identity(root: &RootAuthority, node: u128, role: NodeRole, now: SystemTime) -> NodeIdentity {
    let pending = PendingIdentity::generate().unwrap();
    let request = pending.request_pem().unwrap();
    let certificate = root.sign(&request, subject(node, role), DAY, now).unwrap();
    pending.certified(&certificate, root.certificate_pem()).unwrap()
}

/// Carries a handshake through; the server's view of the client comes out.
fn handshake(client: &Arc<TlsIdentity>, server: &Arc<TlsIdentity>, name: &str) -> Result<bool, rustls::Error> {
    shake(Arc::new(client.client_config(&[b"h2"]).unwrap()), Arc::new(server.server_config(&[b"h2"]).unwrap()), name)
}

fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>, name: &str) -> Result<bool, rustls::Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..4 {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    client.writer().write_all(b"hello").unwrap();
    let mut wire = Vec::new();
    client.write_tls(&mut wire).unwrap();
    server.read_tls(&mut wire.as_slice()).unwrap();
    server.process_new_packets()?;
    let mut text = [0; 5];
    server.reader().read_exact(&mut text).unwrap();
    Ok(server.peer_certificates().is_some())
}

#[test]
fn the_subject_is_the_cas_and_not_the_requests() {
    let now = SystemTime::now();
    let (root, _) = RootAuthority::generate(now).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut wish = rcgen::CertificateParams::new(vec!["swarm-manager".into()]).unwrap();
    wish.distinguished_name.push(rcgen::DnType::OrganizationalUnitName, "swarm-manager");
    wish.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = wish.serialize_request(&key).unwrap().pem().unwrap();
    let certificate = root.sign(&request, subject(7, NodeRole::Worker), DAY, now).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).unwrap();
    let parsed = pem.parse_x509().unwrap();
    assert!(!parsed.is_ca());
    let peer = skep_pki::PeerIdentity::from_certificate(&pem.contents.into()).unwrap();
    assert_eq!(peer.subject, subject(7, NodeRole::Worker));
}

#[test]
fn nodes_of_one_swarm_know_each_other_and_no_others() {
    let now = SystemTime::now();
    let (ours, _) = RootAuthority::generate(now).unwrap();
    let (theirs, _) = RootAuthority::generate(now).unwrap();
    let tls = |root, node, role, now| TlsIdentity::new(identity(root, node, role, now)).unwrap();
    let manager = tls(&ours, 1, NodeRole::Manager, now);
    let worker = tls(&ours, 2, NodeRole::Worker, now);
    let stranger = tls(&theirs, 3, NodeRole::Manager, now);
    let expired = tls(&ours, 4, NodeRole::Manager, now - 3 * DAY);
    assert_eq!(handshake(&worker, &manager, "swarm-manager"), Ok(true));
    assert!(handshake(&manager, &worker, "swarm-manager").is_err(), "a worker is no manager");
    assert_eq!(handshake(&manager, &worker, &skep_pki::ca::tls_name(NodeId::from_u128(2))), Ok(true));
    assert!(handshake(&stranger, &manager, "swarm-manager").is_err());
    assert!(handshake(&worker, &stranger, "swarm-manager").is_err());
    assert!(handshake(&expired, &manager, "swarm-manager").is_err());
    assert!(handshake(&worker, &expired, "swarm-manager").is_err());
    expired.replace(identity(&ours, 4, NodeRole::Manager, now)).unwrap();
    assert_eq!(handshake(&expired, &manager, "swarm-manager"), Ok(true), "a renewed certificate takes effect");
}

#[test]
fn a_joining_node_trusts_the_pinned_root_alone() {
    let now = SystemTime::now();
    let (ours, _) = RootAuthority::generate(now).unwrap();
    let (theirs, _) = RootAuthority::generate(now).unwrap();
    let server = TlsIdentity::new(identity(&theirs, 1, NodeRole::Manager, now)).unwrap();
    let (config, seen) = pinned_client_config(&[b"h2"]).unwrap();
    let name = ServerName::try_from("swarm-manager").unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server.server_config(&[b"h2"]).unwrap())).unwrap();
    for _ in 0..4 {
        let (mut up, mut down) = (Vec::new(), Vec::new());
        client.write_tls(&mut up).unwrap();
        server.read_tls(&mut up.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        server.write_tls(&mut down).unwrap();
        client.read_tls(&mut down.as_slice()).unwrap();
        client.process_new_packets().unwrap();
    }
    // The man in the middle hands over the true root, but its certificate is not under it.
    let now = UnixTime::now();
    assert!(!seen.is_manager_of(ours.certificate_pem(), ours.digest(), now).unwrap());
    assert!(!seen.is_manager_of(theirs.certificate_pem(), ours.digest(), now).unwrap());
    assert!(seen.is_manager_of(theirs.certificate_pem(), theirs.digest(), now).unwrap());
}

#[test]
fn an_identity_survives_on_disk_with_its_key_closed_to_others() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("certificates");
    assert!(NodeIdentity::load(&dir, None).unwrap().is_none());
    let now = SystemTime::now();
    let (root, _) = RootAuthority::generate(now).unwrap();
    let identity = identity(&root, 9, NodeRole::Worker, now);
    identity.save(&dir, None).unwrap();
    let loaded = NodeIdentity::load(&dir, None).unwrap().unwrap();
    assert_eq!(loaded.peer.subject, subject(9, NodeRole::Worker));
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("swarm-node.key"), 0o600);
    let (early, late) = (loaded.renew_after(now, 0.0), loaded.renew_after(now, 1.0));
    assert!(early < late && late < DAY && early > Duration::from_secs(11 * 3600), "{early:?} {late:?}");
}

#[test]
fn while_the_root_changes_all_know_each_other_and_afterwards_the_old_root_is_nothing() {
    let now = SystemTime::now();
    let [(old, _), (new, _)] = [RootAuthority::generate(now).unwrap(), RootAuthority::generate(now).unwrap()];
    let vouched = old.cross_sign(&new, now).unwrap();
    // Of the next root, with the old one's word for it.
    let reissued = |node: u128| {
        let pending = PendingIdentity::generate().unwrap();
        let request = pending.request_pem().unwrap();
        let certificate = new.sign(&request, subject(node, NodeRole::Manager), DAY, now).unwrap();
        pending.certified(&(certificate + &vouched), old.certificate_pem()).unwrap()
    };
    let tls = |identity: NodeIdentity| TlsIdentity::new(identity).unwrap();
    let before = tls(identity(&old, 1, NodeRole::Manager, now));
    let between = tls(reissued(2));
    let after = tls(reissued(3).with_root(new.certificate_pem()));
    let knows =
        |client: &Arc<TlsIdentity>, server: &Arc<TlsIdentity>| handshake(client, server, "swarm-manager").is_ok();
    for (client, server) in [(&before, &between), (&between, &before), (&between, &after), (&after, &between)] {
        assert!(knows(client, server));
    }
    assert!(!knows(&after, &before) && !knows(&before.clone(), &tls(identity(&new, 4, NodeRole::Manager, now))));

    // A configuration that is in use follows.
    let server = Arc::new(between.server_config(&[b"h2"]).unwrap());
    let client = Arc::new(after.client_config(&[b"h2"]).unwrap());
    let in_use = || shake(client.clone(), server.clone(), "swarm-manager");
    assert!(in_use().is_ok());
    after.replace(after.identity().with_root(old.certificate_pem())).unwrap();
    between.replace(identity(&old, 2, NodeRole::Manager, now)).unwrap();
    assert!(in_use().is_ok());
    after.replace(after.identity().with_root(new.certificate_pem())).unwrap();
    assert!(in_use().is_err());

    assert_eq!(
        between.identity().issuer().unwrap().public_key,
        identity(&old, 1, NodeRole::Worker, now).issuer().unwrap().public_key
    );
    assert_eq!(reissued(2).issuer().unwrap(), skep_pki::IssuerInfo::of_pem(new.certificate_pem()).unwrap());
}
