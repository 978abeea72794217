//! Images from a real registry: pulled, pinned, pushed, and fetched once however many want them.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use skep_chaos_tests::{Host, LIMIT, Rig, has_docker, take_turn, wait_until};

/// A real registry, a real image, pulled by tag and pinned to its digest.
#[test]
fn images_come_from_a_registry_and_are_pinned_to_their_digest() {
    take_turn!();
    if !has(&["docker-registry", "skopeo", "umoci", "busybox"]) {
        return;
    }
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    host.start_registry();
    push_busybox(host, "v1");
    let image = "10.77.0.1:5000/box:v1";
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "box",
        "--mode",
        "global",
        "--init",
        image,
        "sh",
        "-c",
        "echo from $HOSTNAME; sleep 1000",
    ]);
    host.await_replicas("box", "2/2");
    let pinned = host.ok(&["service", "inspect", "--format", "{{.Spec.TaskTemplate.ContainerSpec.Image}}", "box"]);
    assert!(pinned.contains("box:v1@sha256:"), "{pinned}");
    wait_until("output of both", LIMIT, || {
        let logs = host.ok(&["service", "logs", "box"]);
        (logs.matches("from ").count() == 2, logs)
    });
    for host in rig.hosts() {
        assert!(host.ok(&["images"]).contains("10.77.0.1:5000/box") || host.ok(&["images"]).contains("<none>"));
    }
    if !has_docker() {
        return;
    }
    // What a user makes of it goes back, and only what is new goes over the wire.
    let context = host.dir().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(
        context.join("Dockerfile"),
        format!("FROM {image}\nRUN echo made here > /tmp/note\nCMD cat /tmp/note\n"),
    )
    .unwrap();
    host.docker(&["build", "-t", "10.77.0.1:5000/made/here:1", context.to_str().unwrap()]);
    let pushed = host.docker(&["push", "10.77.0.1:5000/made/here:1"]);
    assert!(pushed.contains("Mounted from box") && pushed.contains("Pushed"), "{pushed}");
    assert!(host.docker(&["push", "10.77.0.1:5000/made/here:1"]).contains("Layer already exists"));
    for tag in ["2", "3"] {
        host.ok(&["tag", "10.77.0.1:5000/made/here:1", &format!("10.77.0.1:5000/made/here:{tag}")]);
    }
    let all = host.docker(&["push", "--all-tags", "10.77.0.1:5000/made/here"]);
    assert!(["1", "2", "3"].iter().all(|tag| all.contains(&format!("{tag}: digest: sha256:"))), "{all}");
    let second = rig.host(2);
    assert_eq!(second.docker(&["run", "--rm", "-q", "10.77.0.1:5000/made/here:1"]), "made here\n");
    // All tags at once, by both clients.
    for pull in [&["pull", "-a"][..], &["pull", "-q", "--all-tags"]] {
        for tag in second.ok(&["images", "--format", "{{.Tag}}", "10.77.0.1:5000/made/here"]).lines() {
            second.ok(&["rmi", "-f", &format!("10.77.0.1:5000/made/here:{tag}")]);
        }
        let pull = [pull, &["10.77.0.1:5000/made/here"]].concat();
        drop(if pull.contains(&"-a") { second.docker(&pull) } else { second.ok(&pull) });
        assert_eq!(second.ok(&["images", "-q", "10.77.0.1:5000/made/here"]).lines().count(), 3);
    }
    assert!(second.docker_fails(&["pull", "-a", "10.77.0.1:5000/never/made"]).contains("never/made"));
    assert!(second.fails(&["pull", "-a", "10.77.0.1:5000/made/here:1"]).contains("tag can't be used"));
}

/// A registry that may be spoken to without TLS may have it, with a certificate that nobody vouches for.
#[test]
fn an_insecure_registry_is_asked_by_tls_first() {
    take_turn!();
    if !has(&["docker-registry", "openssl"]) {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    let file = |name: &str| host.dir().join(name).display().to_string();
    let (cert, key, config) = (file("registry.crt"), file("registry.key"), file("registry.yml"));
    let make =
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=elsewhere", "-keyout", &key, "-out", &cert];
    assert!(host.exec("openssl", &make).success);
    let text = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 0.0.0.0:5443\n  tls:\n    \
         certificate: {cert}\n    key: {key}\n",
        file("registry-data")
    );
    std::fs::write(&config, text).unwrap();
    host.spawn("docker-registry", &["serve", &config]);
    wait_until("the registry answers", LIMIT, || {
        let ran = host.exec("curl", &["-sk", "-m", "2", "https://127.0.0.1:5443/v2/"]);
        (ran.success, format!("{ran:?}"))
    });
    for name in ["127.0.0.1:5443/box", "localhost:5443/box"] {
        host.ok(&["tag", "busybox", name]);
        host.ok(&["push", name]);
        host.ok(&["rmi", name]);
        host.ok(&["pull", name]);
        // By its digest among those of its repository.
        let id = host.ok(&["images", "-q", name]);
        let listed = host.ok(&["images", "--digests", "--format", "{{.Digest}}", name]);
        assert!(!id.trim().is_empty() && listed.contains("sha256:"), "{id} {listed}");
    }
    // Others have to show that they are who they are.
    let other = format!("{}:5443/box", host.addr());
    host.ok(&["tag", "busybox", &other]);
    let refused = host.fails(&["push", &other]);
    assert!(refused.contains("certificate"), "{refused}");
}

/// Lets clients through to `to`, each connection for so many bytes of its answers; returns what it let through in all.
fn let_through(at: &str, to: &'static str, bytes: u64) -> Arc<AtomicU64> {
    let passed = Arc::new(AtomicU64::new(0));
    let (listener, counted) = (TcpListener::bind(at).unwrap(), passed.clone());
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(to).unwrap();
            let (mut asking, mut asked) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || drop(std::io::copy(&mut asking, &mut asked)));
            let counted = counted.clone();
            std::thread::spawn(move || {
                let (mut answers, mut part) = ((&server).take(bytes), [0; 16 << 10]);
                while let Ok(len @ 1..) = answers.read(&mut part)
                    && (&client).write_all(&part[..len]).is_ok()
                {
                    counted.fetch_add(len as u64, Ordering::Relaxed);
                }
                // Both ends may be closed already.
                let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
            });
        }
    });
    passed
}

#[test]
fn a_pull_that_breaks_off_goes_on_where_it_was() {
    const LEN: u64 = 10 << 20;
    take_turn!();
    if !has(&["docker-registry"]) {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.start_registry();
    import_big(host, LEN);
    let sum = |image: &str| host.ok(&["run", "--rm", image, "sha256sum", "/big"]);
    let wanted = sum("10.77.0.1:5000/big:1");
    host.ok(&["push", "10.77.0.1:5000/big:1"]);
    host.ok(&["rmi", "10.77.0.1:5000/big:1"]);
    let passed = host.within_network(|| let_through("127.0.0.1:5001", "10.77.0.1:5000", LEN / 4));
    host.ok(&["pull", "127.0.0.1:5001/big:1"]);
    assert_eq!(sum("127.0.0.1:5001/big:1"), wanted);
    let passed = passed.load(Ordering::Relaxed);
    assert!((LEN..2 * LEN).contains(&passed), "nothing came twice: {passed} bytes came for {LEN}");
    // One that never gets on is given up, and leaves nothing.
    host.ok(&["rmi", "127.0.0.1:5001/big:1"]);
    host.within_network(|| let_through("127.0.0.1:5002", "10.77.0.1:5000", 900));
    let refused = host.fails(&["pull", "127.0.0.1:5002/big:1"]);
    assert!(refused.contains("127.0.0.1:5002/big"), "{refused}");
    assert_eq!(std::fs::read_dir(host.data().join("image/incoming")).map_or(0, Iterator::count), 0);
}

/// Twelve tasks on one node want the same image at the same moment; it comes over the wire once. What
/// nobody has is asked for without holding up the node.
#[test]
fn tasks_that_want_the_same_image_get_it_by_one_pull() {
    const LEN: u64 = 4 << 20;
    take_turn!();
    if !has(&["docker-registry"]) {
        return;
    }
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.start_registry();
    import_big(host, LEN);
    host.ok(&["push", "10.77.0.1:5000/big:1"]);
    host.ok(&["rmi", "10.77.0.1:5000/big:1"]);
    let passed = host.within_network(|| let_through("127.0.0.1:5001", "10.77.0.1:5000", u64::MAX));
    let create = ["service", "create", "-d", "--no-resolve-image", "--replicas", "12", "--name"];
    host.ok(&[&create[..], &["web", "127.0.0.1:5001/big:1", "sleep", "1000"]].concat());
    host.await_replicas("web", "12/12");
    let passed = passed.load(Ordering::Relaxed);
    assert!((LEN..LEN * 3 / 2).contains(&passed), "{passed} bytes came for {LEN}");
    let pull = || host.run(&["pull", "127.0.0.1:5001/big:1"]);
    std::thread::scope(|scope| {
        let pulls = [scope.spawn(pull), scope.spawn(pull)];
        assert!(pulls.into_iter().all(|pull| pull.join().unwrap().success));
    });
    let none = ["--restart-condition", "none", "127.0.0.1:5001/none:1"];
    host.ok(&[&create[..], &["none"], &none].concat());
    wait_until("all are rejected for the same reason", LIMIT, || {
        let tasks = host.ok(&["service", "ps", "--no-trunc", "none"]);
        (tasks.matches("Rejected").count() == 12 && tasks.matches("image 127.0.0.1:5001/none:1").count() >= 12, tasks)
    });
}

/// As those write it who build for other processors than theirs.
const FOR_ANY: &str = r#"
FROM --platform=$BUILDPLATFORM busybox AS made
ARG TARGETARCH
RUN uname -m > /on; echo $TARGETARCH > /for

FROM scratch
ARG TARGETPLATFORM
LABEL for=$TARGETPLATFORM
COPY --from=made /on /for /
CMD ["/for"]
"#;

#[test]
fn images_for_other_processors_are_built_kept_and_chosen_by_platform() {
    take_turn!();
    if !has(&["docker-registry", "docker"]) {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    host.start_registry();
    let context = tempfile::tempdir().unwrap();
    std::fs::write(context.path().join("Dockerfile"), FOR_ANY).unwrap();
    let dir = context.path().display().to_string();
    let name = |tag: &str| format!("10.77.0.1:5000/any:{tag}");
    let made_for = |image: &str| {
        let format = "{{.Os}}/{{.Architecture}}{{.Variant}} {{index .Config.Labels \"for\"}}";
        host.docker(&["image", "inspect", "-f", format, image]).trim().to_owned()
    };
    for (platform, tag, shown) in [
        ("linux/arm64", "arm64", "linux/arm64"),
        ("linux/arm/v7", "arm", "linux/armv7"),
        ("linux/s390x", "z", "linux/s390x"),
    ] {
        host.docker(&["build", "--platform", platform, "-t", &name(tag), &dir]);
        assert_eq!(made_for(&name(tag)), format!("{shown} {platform}"));
        host.docker(&["push", &name(tag)]);
    }
    // One that runs nowhere here is kept all the same; its files are those that were made here for it.
    host.docker(&["create", "--name", "foreign", &name("arm64")]);
    host.docker(&["cp", "foreign:/on", &dir]);
    host.docker(&["cp", "foreign:/for", &dir]);
    let read = |name: &str| std::fs::read_to_string(context.path().join(name)).unwrap();
    assert_eq!((read("on").trim(), read("for").trim()), (std::env::consts::ARCH, "arm64"));
    let created = host.docker(&["create", &name("z")]);
    assert!(created.contains("The requested image's platform (linux/s390x) does not match"), "{created}");
    // Of an index, the variant that is asked for, or what runs on it.
    let config = context.path().join("config").display().to_string();
    let manifest = |args: &[&str]| {
        let ran = host.exec("docker", &[&["--config", &config, "manifest"], args].concat());
        assert!(ran.success, "{ran:?}");
    };
    manifest(&["create", "--insecure", &name("1"), &name("arm64"), &name("arm")]);
    manifest(&["push", "--insecure", &name("1")]);
    host.docker(&["rm", "-f", "foreign"]);
    host.docker(&["pull", "--platform", "linux/arm64", &name("1")]);
    assert_eq!(made_for(&name("1")), "linux/arm64 linux/arm64");
    host.docker(&["create", "--platform", "linux/arm/v8", &name("1")]);
    assert_eq!(made_for(&name("1")), "linux/armv7 linux/arm/v7", "the client pulls what it has asked for");
    for (platform, want) in [
        ("linux/s390x", "has no variant for linux/s390x; it has linux/arm/v7, linux/arm64"),
        ("linux/abacus", "has no variant for linux/abacus; it has linux/arm/v7, linux/arm64"),
        ("abacus", "unknown operating system or architecture"),
    ] {
        let refused = host.fails(&["pull", "--platform", platform, &name("1")]);
        assert!(refused.contains(want), "{refused}");
    }
    let gone = host.fails(&["pull", &name("gone")]);
    assert!(gone.contains("not found: manifest unknown"), "{gone}");
    // What is saved comes back for the platform that it is for, and no other.
    let saved = context.path().join("saved").display().to_string();
    host.docker(&["save", "-o", &saved, "--platform", "linux/arm64", &name("arm64")]);
    host.docker(&["load", "-i", &saved, "--platform", "linux/arm64"]);
    let other = host.exec("docker", &["-H", &host.socket(), "load", "-i", &saved, "--platform", "linux/s390x"]);
    assert!(
        other.stdout.contains("no image in it is for linux/s390x") || other.stderr.contains("is for linux/s390x"),
        "{other:?}"
    );
}

/// Whether the tools are here.
fn has(tools: &[&str]) -> bool {
    let missing = |tool: &&&str| !Command::new("which").arg(tool).output().is_ok_and(|found| found.status.success());
    let missing = tools.iter().find(missing);
    if let Some(tool) = missing {
        eprintln!("SKIPPED: {tool} is not installed (scripts/bootstrap installs it)");
    }
    missing.is_none()
}

/// Makes an image of so many bytes that cannot be compressed.
fn import_big(host: &Host, len: u64) {
    host.import("10.77.0.1:5000/big:1", &[], |root| {
        let mut random = std::fs::File::open("/dev/urandom").unwrap().take(len);
        std::io::copy(&mut random, &mut std::fs::File::create(root.join("big")).unwrap()).unwrap();
    });
}

fn push_busybox(host: &Host, tag: &str) {
    let layout = host.dir().join("layout").display().to_string();
    let bundle = host.dir().join("bundle").display().to_string();
    let image = format!("{layout}:{tag}");
    let script = format!(
        "set -e; umoci init --layout {layout}; umoci new --image {image}; umoci unpack --image {image} {bundle}; \
         mkdir -p {bundle}/rootfs/bin {bundle}/rootfs/tmp; cp $(which busybox) {bundle}/rootfs/bin/busybox; \
         for a in sh sleep echo cat ls true; do ln -s busybox {bundle}/rootfs/bin/$a; done; \
         umoci repack --image {image} {bundle}; umoci config --image {image} --config.cmd sh; \
         skopeo --insecure-policy copy --dest-tls-verify=false oci:{image} docker://10.77.0.1:5000/box:{tag}"
    );
    let ran = host.exec("sh", &["-c", &script]);
    assert!(ran.success, "{ran:?}");
}
