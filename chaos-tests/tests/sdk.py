"""What users do with Docker's SDK for Python, unchanged: the daemon's socket and the node's address are given."""

import io
import sys
import tarfile
import time

import docker

socket, address = sys.argv[1:]
client = docker.DockerClient(base_url=socket, version="auto", timeout=30)


def refused(kind, work):
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was to be raised")


def wait_until(reached):
    for _ in range(600):
        if reached():
            return
        time.sleep(0.1)
    raise AssertionError("what was waited for did not come within a minute")


def archive(**files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return stream.getvalue()


def containers():
    assert client.containers.run("busybox", "echo hello", remove=True) == b"hello\n"
    error = refused(docker.errors.ContainerError, lambda: client.containers.run("busybox", "sh -c 'echo no >&2; exit 3'"))
    assert error.exit_status == 3 and b"no" in error.stderr, error
    refused(docker.errors.APIError, lambda: client.containers.run("localhost:1/none", "true"))
    box = client.containers.run(
        "busybox",
        "sleep 1000",
        name="box",
        detach=True,
        environment={"WORD": "said"},
        labels={"kind": "test"},
        mem_limit="64m",
        tmpfs={"/scratch": "size=1m"},
        ports={"80/tcp": ("127.0.0.1", 8080)},
        healthcheck={"test": ["CMD", "true"], "interval": 1_000_000_000},
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 2},
    )
    box.reload()
    assert box.status == "running" and box.attrs["HostConfig"]["Memory"] == 64 << 20
    assert box.ports["80/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": "8080"}], box.ports
    assert box.exec_run(["sh", "-c", "echo $WORD"]) == (0, b"said\n")
    code, (out, err) = box.exec_run(["sh", "-c", "echo out; echo err >&2; exit 5"], demux=True)
    assert (code, out, err) == (5, b"out\n", b"err\n")
    assert b"".join(box.exec_run("cat /etc/hostname", stream=True).output).strip() == box.id[:12].encode()
    assert box.put_archive("/tmp", archive(note="noted"))
    bits, stat = box.get_archive("/tmp/note")
    with tarfile.open(fileobj=io.BytesIO(b"".join(bits))) as tar:
        assert stat["size"] == 5 and tar.extractfile("note").read() == b"noted"
    assert {"Path": "/tmp/note", "Kind": 1} in box.diff()
    assert box.stats(stream=False)["memory_stats"]["usage"] > 0
    assert len(box.top()["Processes"]) == 1
    assert [found.name for found in client.containers.list(filters={"label": "kind=test"})] == ["box"]
    box.pause()
    box.unpause()
    box.update(mem_limit="128m", memswap_limit="128m")
    box.rename("other")
    assert client.containers.get("other").id == box.id
    image = box.commit("committed", "1")
    assert client.containers.run(image, "cat /tmp/note", remove=True) == b"noted"
    box.stop(timeout=0)
    assert box.wait()["StatusCode"] == 137
    box.remove()
    refused(docker.errors.NotFound, box.reload)
    ears = client.containers.create("busybox", "sh -c 'read line; echo heard $line; echo end >&2'", stdin_open=True)
    stream = ears.attach_socket(params={"stdin": 1, "stream": 1})
    ears.start()
    stream._sock.sendall(b"you\n")
    assert ears.wait()["StatusCode"] == 0
    assert ears.logs() == b"heard you\nend\n" and ears.logs(stdout=False) == b"end\n"
    assert list(ears.logs(stream=True, tail=1)) == [b"end\n"]
    ears.remove(force=True)
    assert client.containers.prune()["ContainersDeleted"] is not None


def images():
    context = archive(Dockerfile="FROM busybox\nARG WORD=none\nRUN echo $WORD > /word\nCMD cat /word\n")
    image, told = client.images.build(
        fileobj=io.BytesIO(context), custom_context=True, tag="built:1", buildargs={"WORD": "given"}
    )
    assert any("Successfully built" in line.get("stream", "") for line in told)
    assert client.containers.run("built:1", remove=True) == b"given\n"
    refused(
        docker.errors.BuildError,
        lambda: client.images.build(fileobj=io.BytesIO(archive(Dockerfile="FROM busybox\nRUN exit 4\n")), custom_context=True),
    )
    assert image.tag("again", "2") and "again:2" in client.images.get("built:1").tags
    saved = b"".join(image.save(named=True))
    for name in ["again:2", "built:1"]:
        client.images.remove(name)
    refused(docker.errors.ImageNotFound, lambda: client.images.get("built:1"))
    assert client.images.load(saved)[0].id == image.id
    assert image.history() and client.df()["Images"]


def networks_and_volumes():
    volume = client.volumes.create("kept", labels={"kind": "test"})
    client.containers.run("busybox", "sh -c 'echo kept > /data/file'", volumes={"kept": {"bind": "/data"}}, remove=True)
    read = {"kept": {"bind": "/data", "mode": "ro"}}
    assert client.containers.run("busybox", "cat /data/file", volumes=read, remove=True) == b"kept\n"
    pool = docker.types.IPAMPool(subnet="172.30.0.0/24", gateway="172.30.0.254")
    network = client.networks.create("back", ipam=docker.types.IPAMConfig(pool_configs=[pool]), internal=True)
    web = client.containers.run("busybox", "sleep 1000", name="web", detach=True)
    network.connect(web, aliases=["shop"], ipv4_address="172.30.0.7")
    network.reload()
    assert [found.name for found in network.containers] == ["web"]
    assert b"172.30.0.7" in client.containers.run("busybox", "nslookup shop", network="back", remove=True)
    network.disconnect(web)
    web.remove(force=True)
    network.remove()
    volume.remove()
    refused(docker.errors.NotFound, lambda: client.volumes.get("kept"))


def swarm():
    client.swarm.init(advertise_addr=address, listen_addr="0.0.0.0:2377")
    client.swarm.reload()
    assert client.swarm.attrs["JoinTokens"]["Worker"].startswith("SWMTKN-1-")
    (node,) = client.nodes.list()
    spec = node.attrs["Spec"]
    spec["Labels"] = {"zone": "a"}
    assert node.update(spec)
    secret = client.secrets.create(name="password", data=b"sesame")
    config = client.configs.create(name="settings", data=b"on")
    green = client.networks.create("green", driver="overlay", attachable=True)
    service = client.services.create(
        "busybox",
        ["sh", "-c", "cat /run/secrets/password /settings; echo; exec sleep 1000"],
        name="web",
        mode=docker.types.ServiceMode("replicated", replicas=1),
        networks=["green"],
        constraints=["node.labels.zone==a"],
        secrets=[docker.types.SecretReference(secret.id, "password")],
        configs=[docker.types.ConfigReference(config.id, "settings")],
        endpoint_spec=docker.types.EndpointSpec(ports={8080: 80}),
        update_config=docker.types.UpdateConfig(parallelism=1, delay=0, order="start-first"),
    )
    assert service.scale(2)
    running = lambda: [task for task in service.tasks() if task["Status"]["State"] == "running"]
    wait_until(lambda: len(running()) == 2)
    assert b"sesameon" in b"".join(service.logs(stdout=True))
    alone = client.containers.run("busybox", "nslookup tasks.web", network="green", remove=True)
    assert alone.count(b"Address") >= 3, alone
    update = lambda: client.api.update_service(service.id, service.version, labels={"a": "b"}, fetch_current_spec=True)
    refused(docker.errors.APIError, update)  # It was scaled since it was read.
    service.reload()
    update()
    service.reload()
    assert service.attrs["Spec"]["Labels"] == {"a": "b"} and service.force_update() is not None
    refused(docker.errors.APIError, secret.remove)
    service.remove()
    wait_until(lambda: not client.api.containers(all=True))
    for thing in [secret, config, green]:
        thing.remove()
    assert client.swarm.leave(force=True)


assert client.ping() and client.version()["ApiVersion"] and client.info()["Driver"]
containers()
images()
networks_and_volumes()
swarm()
