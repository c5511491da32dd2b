def training_figure(path, report, shown):
    pass
