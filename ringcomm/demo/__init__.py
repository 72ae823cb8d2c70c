"""``python -m ringcomm.demo``: two local processes train on real data, through Gloo and through ringcomm.

``configs`` says what runs and which bars it must pass, ``data`` and ``models`` what is trained,
``timing`` how communication is measured, ``train`` one run, ``worker`` what each rank does,
``launch`` how ranks start and end, ``bars`` and ``report`` what is made of the results,
``__main__`` the command.
"""
