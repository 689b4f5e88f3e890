"""Downloads from a local server that drops connections, and malicious zip files."""

import http.server
import io
import random
import re
import socket
import stat
import threading
import urllib.error
import zipfile
from types import SimpleNamespace

import pytest

from internal.commands import download as program
from internal.datasets import downloads
from internal.evaluation import benchmarks


def zipped(entries, **kinds):
  """A zip file's bytes; `entries` are names and contents."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in entries.items():
      info = zipfile.ZipInfo(name)
      info.external_attr = kinds.get(name, stat.S_IFREG | 0o644) << 16
      archive.writestr(info, content, zipfile.ZIP_DEFLATED)
  return out.getvalue()


def scene_files(*scenes, top=''):
  noise = random.Random(0).randbytes(40_000)
  return {
    f'{top}{scene}/{name}': noise[k:] + scene.encode()
    for k, scene in enumerate(scenes)
    for name in ('images/a.jpg', 'sparse/0/cameras.bin')
  }


class Server:
  """Serves `files`; sends at most `pieces.pop(0)` bytes of an answer and then hangs up."""

  def __init__(self):
    self.files, self.pieces, self.asked, self.tag, self.ranges = {}, [], [], '"1"', True
    self.kind, self.code = 'application/zip', None
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        outer.answer(self)

      def log_message(self, *args):
        pass

    self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.http.server_port}'
    threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

  def answer(self, request):
    wanted = request.headers.get('Range')
    self.asked.append((request.path, wanted))
    content = self.files.get(request.path)
    if self.code or content is None:
      request.send_error(self.code or 404)
      return
    start, total = 0, len(content)
    if wanted and self.ranges and request.headers.get('If-Range') == self.tag:
      start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1])
    if start >= total:
      request.send_response(416)
      request.send_header('Content-Range', f'bytes */{total}')
      request.send_header('Content-Length', '0')
      request.end_headers()
      return
    request.send_response(206 if start else 200)
    request.send_header('Content-Type', self.kind)
    request.send_header('Content-Length', str(total - start))
    request.send_header('ETag', self.tag)
    if start:
      request.send_header('Content-Range', f'bytes {start}-{total - 1}/{total}')
    request.end_headers()
    piece = self.pieces.pop(0) if self.pieces else total
    request.wfile.write(content[start : start + piece])


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(downloads, '_WAIT', 0.0)
  monkeypatch.setenv('no_proxy', '*')
  server = Server()
  yield server
  server.http.shutdown()
  server.http.server_close()


@pytest.fixture
def small(monkeypatch):
  """A dataset of two archives."""
  archives = (
    downloads.Archive('one.zip', 'http://127.0.0.1:9/one', 'https://page', ('x', 'y')),
    downloads.Archive('two.zip', 'http://127.0.0.1:9/two', 'https://page', ('z',), 'top/'),
  )
  monkeypatch.setitem(downloads.ARCHIVES, 'small', archives)


@pytest.fixture
def served(server, small):
  server.files['/one.zip'] = zipped({**scene_files('x', 'y'), 'notes.txt': b'of no scene'})
  server.files['/two.zip'] = zipped({**scene_files('z', top='top/'), '__MACOSX/z/a': b'junk'})
  return server


def content(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in folder.rglob('*')
    if p.is_file() and p.suffix != '.zip'
  }


class TestDownload:
  def test_scenes_are_unpacked_each_in_its_folder(self, served, tmp_path):
    left = downloads.download('small', str(tmp_path), mirror=served.url)
    wanted = {**scene_files('x', 'y'), **scene_files('z')}
    assert content(tmp_path) == wanted
    assert left == [str(tmp_path / 'one.zip'), str(tmp_path / 'two.zip')]

  def test_interrupted_downloads_resume(self, served, tmp_path, capsys):
    whole = len(served.files['/one.zip'])
    served.pieces = [100, 0, whole // 2]
    downloads.download('small', str(tmp_path), ['x'], served.url)
    assert [r for _, r in served.asked] == [
      None, 'bytes=100-', 'bytes=100-', f'bytes={100 + whole // 2}-'
    ]  # fmt: skip
    assert content(tmp_path) == scene_files('x')
    assert f'100 of {whole:,} bytes received; attempt 2' in capsys.readouterr().err

  def test_a_later_start_resumes(self, served, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, '_ATTEMPTS', 1)
    served.pieces = [5000]
    with pytest.raises(downloads.DownloadError, match='The part received is kept'):
      downloads.download('small', str(tmp_path), ['x'], served.url)
    assert (tmp_path / 'one.zip.part').stat().st_size == 5000
    downloads.download('small', str(tmp_path), ['x'], served.url)
    assert served.asked[-1][1] == 'bytes=5000-'
    assert content(tmp_path) == scene_files('x')
    assert not list(tmp_path.glob('*.part*'))

  def test_a_changed_file_is_downloaded_again(self, served, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, '_ATTEMPTS', 1)
    served.pieces = [5000]
    with pytest.raises(downloads.DownloadError):
      downloads.download('small', str(tmp_path), ['x'], served.url)
    served.tag = '"2"'
    served.files['/one.zip'] = zipped(scene_files('y', 'x'))
    downloads.download('small', str(tmp_path), ['x'], served.url)
    assert content(tmp_path)['x/images/a.jpg'] == scene_files('y', 'x')['x/images/a.jpg']

  @pytest.mark.parametrize('tag', ['"1"', 'W/"1"'])
  def test_a_server_without_ranges_sends_all_again(self, served, tmp_path, tag):
    served.ranges, served.tag, served.pieces = False, tag, [100]
    downloads.download('small', str(tmp_path), ['x'], served.url)
    assert content(tmp_path) == scene_files('x')

  def test_what_was_complete_but_not_renamed_is_taken(self, served, tmp_path):
    (tmp_path / 'one.zip.part').write_bytes(served.files['/one.zip'])
    (tmp_path / 'one.zip.part.tag').write_text('"1"')
    downloads.download('small', str(tmp_path), ['y'], served.url)
    assert len(served.asked) == 1
    assert content(tmp_path) == {k: v for k, v in scene_files('x', 'y').items() if k[0] == 'y'}

  def test_nothing_is_fetched_or_unpacked_twice(self, served, tmp_path):
    downloads.download('small', str(tmp_path), mirror=served.url)
    marked = tmp_path / 'x' / 'images' / 'a.jpg'
    marked.write_text('mine')
    served.asked.clear()
    downloads.download('small', str(tmp_path), mirror=served.url)
    assert served.asked == []
    assert marked.read_text() == 'mine'
    for name in ('one.zip', 'two.zip'):
      (tmp_path / name).unlink()
    assert downloads.download('small', str(tmp_path), mirror=served.url) == []
    assert served.asked == []

  def test_an_archive_brought_by_hand_is_unpacked(self, served, tmp_path):
    (tmp_path / 'one.zip').write_bytes(served.files['/one.zip'])
    downloads.download('small', str(tmp_path), ['x', 'y'], 'http://127.0.0.1:9')
    assert content(tmp_path) == scene_files('x', 'y')

  def test_no_network_says_what_to_do(self, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, '_WAIT', 0.0)
    path = tmp_path / 'new' / 'one.zip'
    with pytest.raises(downloads.DownloadError, match=f'https://page.*put it there as {path}'):
      downloads.download('small', str(tmp_path / 'new'))
    assert capsys.readouterr().err.count('attempt') == downloads._ATTEMPTS - 1

  def test_no_retry_without_name_resolution(self, small, tmp_path, monkeypatch, capsys):
    def no_names(*args, **kwargs):
      raise urllib.error.URLError(socket.gaierror(-2, 'Name or service not known'))

    monkeypatch.setattr(downloads.urllib.request, 'urlopen', no_names)
    with pytest.raises(downloads.DownloadError, match=r'not known.*Without a network: Fetch it'):
      downloads.download('small', str(tmp_path))
    assert capsys.readouterr().err == ''

  def test_no_retry_for_a_missing_file(self, served, tmp_path):
    served.files.clear()
    with pytest.raises(downloads.DownloadError, match='404'):
      downloads.download('small', str(tmp_path), mirror=served.url)
    assert len(served.asked) == 1

  def test_a_busy_server_is_retried(self, served, tmp_path):
    served.code = 503
    with pytest.raises(downloads.DownloadError, match='503'):
      downloads.download('small', str(tmp_path), mirror=served.url)
    assert len(served.asked) == downloads._ATTEMPTS

  def test_a_web_page_is_an_error(self, served, tmp_path):
    served.kind = 'text/html; charset=utf-8'
    with pytest.raises(
      downloads.DownloadError, match=r'web page instead of one\.zip.*https://page'
    ):
      downloads.download('small', str(tmp_path), mirror=served.url)
    assert len(served.asked) == 1

  def test_a_full_disk_is_reported_first(self, served, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(downloads.shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(downloads.DownloadError, match=r'one\.zip needs 0\.0 GB'):
      downloads.download('small', str(tmp_path), mirror=served.url)

  @pytest.mark.parametrize(
    ('args', 'words'),
    [
      (('361',), "'361'; use one of 360, llff, blender"),
      (('360', ['lego']), "no scene 'lego'; use one of bicycle"),
    ],
  )
  def test_unknown_names_list_the_choices(self, tmp_path, args, words):
    with pytest.raises(downloads.DownloadError, match=words):
      downloads.download(args[0], str(tmp_path), *args[1:])

  @pytest.mark.parametrize('mirror', ['ftp://a', '/a', 'file:///etc'])
  def test_mirrors_are_web_addresses(self, small, tmp_path, mirror):
    with pytest.raises(downloads.DownloadError, match='http'):
      downloads.download('small', str(tmp_path), mirror=mirror)


class TestUnpack:
  def unpack(self, tmp_path, data):
    path = tmp_path / 'in' / 'a.zip'
    path.parent.mkdir()
    path.write_bytes(data)
    archive = downloads.Archive('a.zip', '', '', ('x',))
    downloads.unpack(str(path), archive, str(tmp_path / 'in'))

  @pytest.mark.parametrize(
    'name', ['x/../../evil', 'x/../../../evil', 'x//evil', 'x/..\\..\\evil', 'x/./../../evil']
  )
  def test_nothing_leaves_the_folder(self, tmp_path, name):
    self.unpack(tmp_path, zipped({'x/a': b'good', name: b'bad'}))
    assert {p.name for p in (tmp_path / 'in').iterdir()} == {'a.zip', 'x'}
    assert [p.name for p in tmp_path.iterdir()] == ['in']
    assert len([p for p in (tmp_path / 'in' / 'x').rglob('*') if p.is_file()]) == 2

  @pytest.mark.parametrize('name', ['/evil', '../evil', 'y/evil'])
  def test_files_outside_scenes_stay_packed(self, tmp_path, name):
    self.unpack(tmp_path, zipped({'x/a': b'good', name: b'bad'}))
    assert {p.name for p in tmp_path.rglob('*') if p.is_file()} == {'a.zip', 'a'}

  def test_links_become_plain_files(self, tmp_path):
    self.unpack(tmp_path, zipped({'x/link': b'/etc'}, **{'x/link': stat.S_IFLNK | 0o777}))
    link = tmp_path / 'in' / 'x' / 'link'
    assert not link.is_symlink()
    assert link.read_bytes() == b'/etc'

  def test_a_file_that_is_also_a_folder_is_damage(self, tmp_path):
    with pytest.raises(downloads.DownloadError, match='damaged'):
      self.unpack(tmp_path, zipped({'x/link': b'/etc', 'x/link/passwd': b'bad'}))

  def test_damage_is_found_and_leaves_no_scene(self, tmp_path):
    data = bytearray(zipped(scene_files('x')))
    data[2000] ^= 255
    with pytest.raises(downloads.DownloadError, match=r'damaged.*Remove it'):
      self.unpack(tmp_path, bytes(data))
    assert not (tmp_path / 'in' / 'x').exists()

  @pytest.mark.parametrize('data', [b'', b'PK\x03\x04', b'<html>'])
  def test_no_zip_file(self, tmp_path, data):
    with pytest.raises(downloads.DownloadError, match='damaged'):
      self.unpack(tmp_path, data)

  def test_an_unexpected_archive_is_an_error(self, tmp_path):
    with pytest.raises(downloads.DownloadError, match='has no x/'):
      self.unpack(tmp_path, zipped(scene_files('y')))

  def test_incomplete_unpacking_is_repeated(self, tmp_path):
    (tmp_path / 'in' / 'x.part').mkdir(parents=True)
    (tmp_path / 'in' / 'x.part' / 'old').touch()
    path = tmp_path / 'a.zip'
    path.write_bytes(zipped(scene_files('x')))
    downloads.unpack(str(path), downloads.Archive('a.zip', '', '', ('x',)), str(tmp_path / 'in'))
    assert content(tmp_path / 'in') == scene_files('x')


class TestProgram:
  def test_fetches_and_says_what_comes_next(self, server, tmp_path, monkeypatch, capsys):
    archive = downloads.ARCHIVES['blender'][0]
    server.files['/nerf_synthetic.zip'] = zipped(scene_files(*archive.scenes, top=archive.top))
    program.main(['blender', str(tmp_path), '--mirror', server.url, '--scenes', 'lego'])
    out = capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ['lego']
    assert f'No longer needed: {tmp_path / "nerf_synthetic.zip"}' in out
    assert f'scripts/run_dataset.py --dataset blender --root {tmp_path}' in out

  def test_all_scenes_of_the_benchmarks_can_be_fetched(self):
    for name, benchmark in benchmarks.load_all().items():
      scenes = [scene for archive in downloads.ARCHIVES[name] for scene in archive.scenes]
      assert sorted(scenes) == sorted(benchmark.scenes)
    for archives in downloads.ARCHIVES.values():
      for archive in archives:
        assert archive.url.startswith('https://')
        assert archive.page.startswith('https://')
