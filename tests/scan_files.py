"Heads drawn as volumes, and files of every kind that hold them"
import nibabel as nib, numpy as np, pytest
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

AXES = st.permutations([0,1,2]).flatmap(lambda p: st.tuples(*(st.sampled_from([('L','R'),('P','A'),('I','S')][i]) for i in p)))

def draw_volume(shape=(44,52,40), centre=(.1,-.15), dtype=np.int16):
    "A lopsided brain with a dark, lopsided hole in it"
    x,y,z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
    r = np.sqrt(x**2+y**2+z**2)
    a = np.select([r<.86, r<.9], [700+150*x+80*y, 40], 0)
    a[((x-centre[0])/.25)**2+((y-centre[1])/.3)**2+((z-.1)/.5)**2<1] = 300
    return a.astype(dtype)

def head_volume(n=170):
    "Scalp, bone, fluid and brain as shells, from below the top of the volume; and where the brain is"
    z = np.mgrid[:n,:n,:n]
    r = np.sqrt(((z[0]-n/2)/(n*.42))**2+((z[1]-n/2)/(n*.46))**2+((z[2]-n/2)/(n*.46))**2)
    return np.select([r<.8, r<.9, r<1], [150, 15, 220], 0).astype(np.uint8), r<.8

def save(path, a, affine=None, axes=None):
    "A volume as a file, in another order of axes if one is given"
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = nib.MGHImage if path.suffix in ('.mgz','.mgh') else nib.Nifti1Image
    im = kind(a, np.eye(4) if affine is None else affine)
    if axes: im = im.as_reoriented(ornt_transform(io_orientation(im.affine), axcodes2ornt(axes)))
    nib.save(im, path)
    return path

def huge_header(path, shape, dtype=np.int16):
    "A file that claims to hold a volume of this shape"
    h = nib.Nifti2Header()
    h.set_data_shape(shape)
    h.set_data_dtype(dtype)
    h['vox_offset'] = 544
    path.write_bytes(h.binaryblock+bytes(600))
    return path

def write_dicom(folder, a, spacing=(1.,1.,1.), origin=(0.,0.,0.), skip=(), uid='1.2.3', names='IM{:04d}', **tags):
    "Axial DICOM slices of a volume in LPS order of axes, in files whose names say nothing of their place; tags of None are left out"
    pydicom = pytest.importorskip('pydicom')
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(a.shape[2])
    for k in range(a.shape[2]):
        if k in skip: continue
        m = pydicom.dataset.FileMetaDataset()
        m.MediaStorageSOPClassUID,m.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.4',f'{uid}.{k+1}'
        m.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds = pydicom.dataset.FileDataset('', {}, file_meta=m, preamble=bytes(128))
        all_tags = dict(SOPClassUID=m.MediaStorageSOPClassUID, SOPInstanceUID=f'{uid}.{k+1}', SeriesInstanceUID=uid,
            Rows=a.shape[1], Columns=a.shape[0], PixelSpacing=[spacing[1],spacing[0]], ImageOrientationPatient=[1,0,0,0,1,0],
            ImagePositionPatient=[origin[0],origin[1],origin[2]+spacing[2]*k], SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2',
            BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=0, RescaleSlope=2, RescaleIntercept=-10,
            PixelData=np.ascontiguousarray(a[:,:,k].T, '<u2').tobytes()) | tags
        for name,v in all_tags.items():
            if v is not None: setattr(ds, name, v)
        ds.save_as(folder/names.format(int(order[k])), enforce_file_format=True)
    return folder

def write_enhanced_dicom(folder, a, spacing=(1.,1.,1.), origin=(0.,0.,0.), places=None):
    "The same slices as the frames of one enhanced file, shuffled; `places` along the third axis, mm"
    pydicom = pytest.importorskip('pydicom')
    folder.mkdir(parents=True, exist_ok=True)
    def part(**tags):
        ds = pydicom.Dataset()
        for k,v in tags.items(): setattr(ds, k, v)
        return ds
    ks = np.random.default_rng(0).permutation(a.shape[2])
    at = spacing[2]*np.arange(a.shape[2]) if places is None else places
    shared = part(PixelMeasuresSequence=[part(PixelSpacing=[spacing[1],spacing[0]], SliceThickness=spacing[2])],
        PlaneOrientationSequence=[part(ImageOrientationPatient=[1,0,0,0,1,0])],
        PixelValueTransformationSequence=[part(RescaleSlope=2, RescaleIntercept=-10, RescaleType='US')])
    frames = [part(PlanePositionSequence=[part(ImagePositionPatient=[origin[0],origin[1],origin[2]+at[k]])]) for k in ks]
    write_dicom(folder, a[:,:,:1], spacing, names='frames', RescaleSlope=None, RescaleIntercept=None, PixelSpacing=None,
        ImageOrientationPatient=None, ImagePositionPatient=None, NumberOfFrames=len(ks), SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames, PixelData=np.ascontiguousarray(a[:,:,ks].T, '<u2').tobytes())
    return folder
